"""What of the base a patch may refer to: all of a small one, else the pages most alike to some bytes.

What zstd knows of a base that is one window is prepared once for all blocks, which takes longer than most
patches. Used by the encoder only; safe to use from several threads.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from updater import limits
from updater.delta.contents import ContentIndex
from updater.delta.streams import Ranges

Bytes = NDArray[np.uint8]


class BaseWindows:
    """Windows of one base.

    Attributes:
        whole: the base's bytes where they are one window, else none.
    """

    def __init__(self, base: Bytes) -> None:
        self._base = base
        self.whole = base.tobytes() if len(base) <= limits.MAX_WINDOW_BYTES else b""
        self._lock = threading.Lock()
        self._index: ContentIndex | None = None  # made when first needed: it costs time and memory
        self._prepared: dict[tuple[int, ...], zstandard.ZstdCompressionDict] = {}

    def ranges(self, data: bytes) -> Ranges:
        """Where in the base the window for some bytes lies; none where there is nothing to refer to."""
        if self.whole:
            return ((0, len(self.whole)),)
        if not len(self._base):
            return ()
        return self.contents().windows(np.frombuffer(data, dtype=np.uint8), limits.MAX_WINDOW_BYTES)

    def read(self, ranges: Ranges) -> bytes:
        """The bytes of a window."""
        if self.whole:
            return self.whole
        return b"".join(self._base[start : start + length].tobytes() for start, length in ranges)

    def dictionary(
        self, window: bytes, parameters: zstandard.ZstdCompressionParameters
    ) -> zstandard.ZstdCompressionDict:
        """A window that was read, for compressors with these parameters."""
        if window is not self.whole:
            return zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        key = (
            parameters.strategy,
            parameters.hash_log,
            parameters.chain_log,
            parameters.search_log,
            parameters.min_match,
            parameters.target_length,
        )
        with self._lock:
            if key not in self._prepared:
                made = zstandard.ZstdCompressionDict(window, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
                made.precompute_compress(compression_params=parameters)
                self._prepared[key] = made
            return self._prepared[key]

    def contents(self) -> ContentIndex:
        """Where the base's content occurs."""
        with self._lock:
            if self._index is None:
                self._index = ContentIndex(self._base)
            return self._index
