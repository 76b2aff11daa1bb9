"""What may join the published metadata: nothing that a device would refuse or that makes it forget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata, Root

from edge_tests.unit.updater.trust_repository import MODEL, Simulator, digest_of
from updater.errors import SluiceError
from updater.trust import roles
from updater.trust.documents import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, sign, write
from updater.trust.repository import publish, with_online

KEY = CryptoSigner.generate_ed25519()


@pytest.fixture
def made() -> Simulator:
    simulator = Simulator()
    simulator.push(1)
    return simulator


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(SluiceError) as caught:
        work()
    return caught.value.code


def rooted(made: Simulator, *signers: Signer, **changes: object) -> Metadata[Root]:
    """The next root with a change of the root role, signed by the simulator's keys and others."""
    after = roles.change_root(made.root(), ROOT, made.until(365), **changes)  # type: ignore[arg-type]
    sign(after, [*made.roots, *signers])
    return after


def test_what_is_there_already_changes_nothing(made: Simulator) -> None:
    before = made.repository
    again = publish(
        before,
        [(ROOT, made.pinned), (TARGETS, before.targets[TARGETS])],
        online_keyid=made.online.public_key.keyid,
        now=made.now,
    )
    assert not again.changed


def test_roots_come_one_by_one(made: Simulator) -> None:
    second = rooted(made, KEY, add=[KEY.public_key])
    third = roles.renew(second, made.until(365))
    sign(third, [*made.roots, KEY])
    assert refused(lambda: made.publish((ROOT, write(third)))) == "METADATA_INVALID"
    made.publish((ROOT, write(second)), (ROOT, write(third)))
    assert made.root().signed.version == 3
    assert refused(lambda: made.publish((ROOT, write(second)))) == "METADATA_ROLLED_BACK"


def test_a_root_needs_the_old_keys_and_its_own(made: Simulator) -> None:
    after = roles.change_root(
        made.root(), ROOT, made.until(365), add=[KEY.public_key], remove=[made.roots[0].public_key.keyid]
    )
    sign(after, [KEY])
    assert refused(lambda: made.publish((ROOT, write(after)))) == "SIGNATURE_INVALID"
    after.signatures.clear()
    sign(after, made.roots)
    assert refused(lambda: made.publish((ROOT, write(after)))) == "SIGNATURE_INVALID"
    sign(after, [KEY])
    made.publish((ROOT, write(after)))


def test_a_root_must_name_the_online_key_that_is_here(made: Simulator) -> None:
    after = roles.change_root(
        made.root(),
        roles.ONLINE,
        made.until(365),
        add=[KEY.public_key],
        remove=[made.online.public_key.keyid],
    )
    sign(after, made.roots)
    assert refused(lambda: made.publish((ROOT, write(after)))) == "METADATA_INVALID"
    assert refused(lambda: with_online(made.repository, KEY, 1, made.until(1))) == "METADATA_INVALID"


def test_a_root_may_not_leave_targets_unsigned(made: Simulator) -> None:
    after = roles.change_root(
        made.root(),
        TARGETS,
        made.until(365),
        add=[KEY.public_key],
        remove=[made.signers[0].public_key.keyid],
    )
    sign(after, made.roots)
    assert refused(lambda: made.publish((ROOT, write(after)))) == "SIGNATURE_INVALID"
    renewed = roles.renew(made.targets(), made.until(365))
    sign(renewed, [KEY])
    made.publish((ROOT, write(after)), (TARGETS, write(renewed)))


def test_targets_only_grow_and_are_fresh(made: Simulator) -> None:
    old = made.repository.targets[TARGETS]
    made.push(2)
    assert refused(lambda: made.publish((TARGETS, old))) == "METADATA_ROLLED_BACK"
    stale = roles.renew(made.targets(), made.until(-1))
    sign(stale, made.signers)
    assert refused(lambda: made.publish((TARGETS, write(stale)))) == "METADATA_EXPIRED"


@pytest.mark.parametrize("role", [SNAPSHOT, TIMESTAMP])
def test_what_the_control_plane_signs_cannot_be_published(made: Simulator, role: str) -> None:
    assert refused(lambda: made.publish((role, made.others()[role]))) == "METADATA_INVALID"


def test_a_delegated_role_comes_with_its_metadata(made: Simulator) -> None:
    who = roles.RoleKeys((KEY.public_key,))
    after = roles.delegate(made.targets(), "team", who, ["team-*"], made.until(365))
    sign(after, made.signers)
    assert refused(lambda: made.publish((TARGETS, write(after)))) == "METADATA_INVALID"
    theirs = roles.make_targets(made.until(365))
    unsigned = write(theirs)
    sign(theirs, [KEY])
    assert refused(lambda: made.publish(("team", write(theirs)))) == "METADATA_INVALID"
    assert refused(lambda: made.publish((TARGETS, write(after)), ("team", unsigned))) == "SIGNATURE_INVALID"
    made.publish((TARGETS, write(after)), ("team", write(theirs)))
    nested = roles.delegate(theirs, "deeper", who, ["team-x"], made.until(365))
    sign(nested, [KEY])
    assert refused(lambda: made.publish(("team", write(nested)))) == "METADATA_INVALID"


def test_a_role_that_was_taken_back_stays_listed(made: Simulator) -> None:
    """A snapshot that forgot a role would be refused by every device that knew it."""
    who = roles.RoleKeys((KEY.public_key,))
    after = roles.delegate(made.targets(), "team", who, ["team-*"], made.until(365))
    sign(after, made.signers)
    theirs = roles.make_targets(made.until(365))
    sign(theirs, [KEY])
    made.publish((TARGETS, write(after)), ("team", write(theirs)))
    back = roles.undelegate(made.targets(), "team", made.until(365))
    sign(back, made.signers)
    made.publish((TARGETS, write(back)))
    assert made.repository.online is not None
    assert "team.json" in made.repository.online.snapshot.signed.meta


def test_a_delegated_role_cannot_name_other_models(made: Simulator) -> None:
    who = roles.RoleKeys((KEY.public_key,))
    after = roles.delegate(made.targets(), "team", who, ["team-*"], made.until(365))
    sign(after, made.signers)
    theirs = roles.add_version(
        roles.make_targets(made.until(365)), MODEL, 9, digest_of(9), 100, made.until(365)
    )
    sign(theirs, [KEY])
    made.publish((TARGETS, write(after)), ("team", write(theirs)))
    assert made.repository.find(f"{MODEL}/9") is None
    assert made.repository.find(f"{MODEL}/1") is not None


def test_online_versions_follow_the_clock_and_never_fall(made: Simulator) -> None:
    def version() -> int:
        assert made.repository.online is not None
        return made.repository.online.timestamp.signed.version

    first = version()
    made.resign()
    assert version() == first + 1  # the same millisecond
    made.pass_days(1)
    assert version() == int(made.now.timestamp() * 1000)
    made.pass_days(-300)
    last = version()
    made.resign()
    assert version() == last + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda made: roles.change_root(made.root(), "nobody", made.until(1)),
        lambda made: roles.change_root(made.root(), ROOT, made.until(1), remove=["0" * 64]),
        lambda made: roles.change_root(made.root(), ROOT, made.until(1), threshold=2),
        lambda made: roles.change_root(
            made.root(), ROOT, made.until(1), remove=[made.roots[0].public_key.keyid]
        ),
        lambda made: roles.delegate(
            made.targets(), "root", roles.RoleKeys((KEY.public_key,)), ["m"], made.now
        ),
        lambda made: roles.delegate(
            made.targets(), "t", roles.RoleKeys((KEY.public_key,)), ["a/b"], made.now
        ),
        lambda made: roles.delegate(made.targets(), "t", roles.RoleKeys((KEY.public_key,)), [], made.now),
        lambda made: roles.delegate(made.targets(), "t", roles.RoleKeys(()), ["m"], made.now),
        lambda made: roles.undelegate(made.targets(), "t", made.now),
        lambda made: roles.change_delegated(made.targets(), "t", made.now),
        lambda made: roles.allow(made.targets(), MODEL, 1, 1, made.now),
    ],
    ids=range(11),
)
def test_changes_that_make_no_sense(made: Simulator, change: Callable[[Simulator], object]) -> None:
    assert refused(lambda: change(made)) == "REQUEST_INVALID"
