from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agent import config as configuration
from agent.config import KEYS, AgentConfig, load
from sluice.api.v1 import errors_pb2
from updater.errors import SluiceError

DOC = Path(__file__).parents[3] / "docs" / "agent-config.md"
LEAST = '[control]\naddress = "control.example:8470"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_one_key_is_enough(tmp_path: Path) -> None:
    config = load(write(tmp_path, LEAST))
    assert config.control_address == "control.example:8470"
    assert config.state_dir == Path("/var/lib/sluice")
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", config.device_id)
    assert config.device_id == load(write(tmp_path, LEAST)).device_id


def test_every_key(tmp_path: Path) -> None:
    config = load(
        write(
            tmp_path,
            """
            device_id = "pi-7"
            state_dir = "/srv/sluice"
            labels = { site = "oslo" }
            [control]
            address = "[::1]:8470"
            enrolment_address = "[::1]:9000"
            bundle = "/etc/sluice/bundle.pem"
            token = "slt_x"
            certificate = "/run/spire/svid.pem"
            key = "/run/spire/svid.key"
            server_name = "control.example"
            poll_interval_s = 5
            reconnect_max_s = 0.5
            [inference]
            address = "127.0.0.1:0"
            threads = 4
            cache_bytes = 1000000
            process_memory_bytes = 300000000
            crash_loop_deaths = 5
            crash_loop_window_s = 300
            runtimes = ["litert"]
            model_control = true
            socket = "/run/i.sock"
            group = "vision"
            [metrics]
            address = "127.0.0.1:9100"
            [admin]
            socket = "/run/x.sock"
            group = "998"
            [telemetry]
            interval_s = 1.5
            outbox_max_bytes = 65536
            [update]
            keep_versions = 0
            reserve_bytes = 1
            soak_s = 0
            load_deadline_s = 9
            """,
        )
    )
    assert config == AgentConfig(
        control_address="[::1]:8470",
        enrolment_address="[::1]:9000",
        control_bundle=Path("/etc/sluice/bundle.pem"),
        control_token="slt_x",
        control_certificate=Path("/run/spire/svid.pem"),
        control_key=Path("/run/spire/svid.key"),
        control_server_name="control.example",
        device_id="pi-7",
        state_dir=Path("/srv/sluice"),
        labels={"site": "oslo"},
        poll_interval_s=5.0,
        reconnect_max_s=0.5,
        inference_address="127.0.0.1:0",
        threads=4,
        cache_bytes=1_000_000,
        process_bytes=300_000_000,
        crash_loop_deaths=5,
        crash_loop_window_s=300.0,
        runtimes=("litert",),
        model_control=True,
        inference_socket=Path("/run/i.sock"),
        inference_group="vision",
        metrics_address="127.0.0.1:9100",
        admin_socket=Path("/run/x.sock"),
        admin_group="998",
        telemetry_interval_s=1.5,
        outbox_max_bytes=65536,
        keep_versions=0,
        reserve_bytes=1,
        soak_s=0.0,
        load_deadline_s=9.0,
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "control.address is required"),
        (LEAST + "adress = 1\n", "control.adress is not a key; did you mean control.address?"),
        (LEAST + "[trust]\ncertificates = 1\n", "trust.certificates is not a key; trust has trust.root"),
        ("colour = 1\n" + LEAST, "colour is not a key"),
        ("control = 3\n", "control must be a table"),
        ('[control]\naddress = "nowhere"\n', "control.address must be host:port with a port from 1 to 65535"),
        ('[control]\naddress = "x:0"\n', "control.address"),
        ('[control]\naddress = "x:99999"\n', "control.address"),
        (LEAST + "poll_interval_s = 0\n", "control.poll_interval_s must be a number from 1 to 86400, not 0"),
        (LEAST + "poll_interval_s = nan\n", "control.poll_interval_s"),
        (LEAST + "poll_interval_s = true\n", "control.poll_interval_s"),
        (LEAST + '[inference]\nthreads = "two"\n', "inference.threads must be an integer from 1 to 256"),
        (LEAST + "[inference]\nthreads = 1.5\n", "inference.threads"),
        (
            LEAST + "[inference]\ncrash_loop_deaths = 1\n",
            "inference.crash_loop_deaths must be an integer from 2",
        ),
        (LEAST + '[inference]\nruntimes = ["cuda"]\n', "inference.runtimes must be a list of names out of"),
        (LEAST + "[inference]\nmodel_control = 1\n", "inference.model_control must be true or false, not 1"),
        (LEAST + '[admin]\nsocket = "relative.sock"\n', "admin.socket must be an absolute path"),
        (LEAST + f'[admin]\nsocket = "/{"x" * 120}"\n', "admin.socket is longer than the 107 bytes"),
        (LEAST + f'[inference]\nsocket = "/{"x" * 120}"\n', "inference.socket is longer than the 107 bytes"),
        (LEAST + '[inference]\ngroup = "vision"\n', "inference.group needs inference.socket"),
        (LEAST + "[admin]\ngroup = 5\n", "admin.group must be text"),
        ('device_id = "-x"\n' + LEAST, "device_id must be 1 to 64"),
        ('device_id = "a\\u0000b"\n' + LEAST, "device_id must be text"),
        ("labels = { a = 1 }\n" + LEAST, "labels.a must be text"),
        ("device_id = \n", "is not TOML"),
        ("x" * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, text: str, names: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SluiceError) as caught:
        load(path)
    assert caught.value.reason == errors_pb2.CONFIG_INVALID
    assert names in caught.value.message
    assert str(path) in caught.value.message


def test_missing_file_and_foreign_bytes(tmp_path: Path) -> None:
    with pytest.raises(SluiceError, match="cannot read the configuration"):
        load(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SluiceError, match="is not TOML"):
        load(tmp_path / "bytes.toml")


def test_document_describes_exactly_the_keys() -> None:
    rows: dict[str, list[str]] = {}
    for line in DOC.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 7 and cells[1].startswith("`"):
            rows[cells[1].strip("`")] = cells
    assert list(rows) == [key.name for key in KEYS]
    defaults: dict[str, Any] = {
        name: getattr(AgentConfig, name, None) for name in AgentConfig.__annotations__
    }
    for key in KEYS:
        cells = rows[key.name]
        if key.kind in ("number", "integer"):
            assert cells[4] == f"{defaults[key.field]:g}" or cells[4] == str(defaults[key.field]), key
            assert f"{int(key.most)}" in cells[5], key
            assert f"{key.least:g}" in cells[5], key


def test_admin_socket_default_is_in_the_state_directory() -> None:
    assert configuration.default_admin_socket(Path("/srv/x")) == Path("/srv/x/agent.sock")


def test_a_socket_for_inference_closes_tcp_unless_that_is_asked_for(tmp_path: Path) -> None:
    only = load(write(tmp_path, LEAST + '[inference]\nsocket = "/run/i.sock"\n'))
    assert (only.inference_address, only.inference_socket) == ("", Path("/run/i.sock"))
    both = LEAST + '[inference]\nsocket = "/run/i.sock"\naddress = "127.0.0.1:0"\n'
    assert load(write(tmp_path, both)).inference_address == "127.0.0.1:0"
    assert load(write(tmp_path, LEAST)).inference_socket is None
