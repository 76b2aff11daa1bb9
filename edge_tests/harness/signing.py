"""An operator's keys for tests: a root and a targets key, set up at a control plane, signing what is pushed.

`OperatorTrust` does what `sluice trust init` and `sluice model push` do, with keys that are not sealed,
because opening a seal takes a fifth of a second. The root of the one that stands is pinned on every agent
that the harness starts meanwhile (`pinned_root`), as an installer would.
"""

from __future__ import annotations

from pathlib import Path

from fleet.client import ControlClient
from fleet.signing import Signing
from fleet.trust_directory import TrustDirectory
from updater.manifest import Manifest
from updater.trust import roles
from updater.trust.keys import new_key, parse_public_key

_standing: list[OperatorTrust] = []


class OperatorTrust:
    """One operator's trust directory, set up at a control plane that has no root yet.

    Args:
        directory: created.
        client: of that control plane.
    """

    def __init__(self, directory: Path, client: ControlClient) -> None:
        self._client = client
        self.directory = TrustDirectory(directory)
        self.root = self.directory.root_path
        self.signing = Signing(self.directory, client, _unasked)
        keys = [new_key(name, None) for name in ("root", "targets")]
        for key in keys:
            self.directory.add_key(key)
        online = parse_public_key(client.get_trust().online_key)
        who, what = (roles.RoleKeys((key.public,)) for key in keys)
        self.signing.set_up(who, what, online)
        _standing.append(self)

    def sign(self, manifest: Manifest) -> None:
        """Names a version in signed metadata that is published without the version itself."""
        if documents := self.signing.sign_version(manifest):
            self._client.publish_metadata(documents)

    def close(self) -> None:
        """Agents that start from now on get no root from here."""
        _standing.remove(self)


def pinned_root() -> Path | None:
    """The root of the operator who was set up last and stands; None where none does."""
    return _standing[-1].root if _standing else None


def _unasked(name: str) -> str:
    raise AssertionError(f"the key {name} is not sealed")
