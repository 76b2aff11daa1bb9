"""One page over HTTP, for metrics.py; apart from it because the standard library's server is not light."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

log = logging.getLogger(__name__)


def serve(
    address: str, path: str, content_type: str, body: Callable[[], bytes], timeout_s: float
) -> tuple[int, Callable[[], None]]:
    """Serves what `body` gives at `path`, in a thread.

    Args:
        address: host:port; port 0 takes a free one.
        path: that is answered; everything else is 404.
        content_type: of the page.
        body: called for each request.
        timeout_s: for one connection to send its request and take the answer, seconds.

    Returns:
        The port, and a function that ends the server.

    Raises OSError when the address cannot be bound.
    """

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != path:
                self.send_error(404, "only the metrics are here")
                return
            page = body()
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - its signature
            log.debug(format, *arguments)

    class Server(HTTPServer):
        address_family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET

        def finish_request(self, request: Any, client_address: Any) -> None:
            end = threading.Timer(timeout_s, _shut, (request,))  # also for one that sends byte by byte
            end.daemon = True
            end.start()
            try:
                super().finish_request(request, client_address)
            finally:
                end.cancel()

        def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - its signature
            log.debug("a metrics connection from %s failed", client_address, exc_info=True)

    host, _, port = address.rpartition(":")
    server = Server((host.strip("[]"), int(port)), Page)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout_s)

    return server.server_address[1], stop


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
