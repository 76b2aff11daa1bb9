"""The tables of the database. Migrations (migrations/versions) make exactly these; a test compares.

Times are integer microseconds since 1970, digests are text, protobuf messages are kept as their bytes where
nothing inside them is queried.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData()

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("created_us", BigInteger, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("model", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("manifest", LargeBinary, nullable=False),
    Column("manifest_digest", Text, nullable=False),
    Column("content_digest", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("retired", Boolean, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["model"], ["models.name"]),
)

# Every file of every version, so that a digest on a device leads to what it is.
version_files = Table(
    "version_files",
    metadata,
    Column("model", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("variant", Text, primary_key=True),
    Column("path", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("format", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
    Index("version_files_by_digest", "digest"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("model", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
)

# Deltas that were built and proven, and builds that failed. An empty base means a full copy.
deltas = Table(
    "deltas",
    metadata,
    Column("base", Text, primary_key=True),
    Column("target", Text, primary_key=True),
    Column("ready", Boolean, nullable=False),
    Column("encoder", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("base_size", BigInteger, nullable=False),
    Column("target_size", BigInteger, nullable=False),
    Column("features", Text, nullable=False),
    Column("regions", LargeBinary, nullable=False),
    Column("built_us", BigInteger, nullable=False),
    Column("used_us", BigInteger, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("retry_us", BigInteger, nullable=False),
    Column("failure", Text, nullable=False),
    Index("deltas_by_digest", "digest"),
)

devices = Table(
    "devices",
    metadata,
    Column("id", Text, primary_key=True),
    Column("state", Integer, nullable=False),
    Column("agent_version", Text, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("capabilities", LargeBinary, nullable=False),
    Column("own_labels", Text, nullable=False),
    Column("operator_labels", Text, nullable=False),
    Column("reported", LargeBinary, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False),
)

# What each device should run. A row stays when its rollout ends.
desired_models = Table(
    "desired_models",
    metadata,
    Column("device", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("manifest_digest", Text, nullable=False),
    Column("rollout", Text, nullable=False),
    ForeignKeyConstraint(["device"], ["devices.id"]),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
)

# The versions that each device was given, the newest few of each model: what it may ask for.
assigned_versions = Table(
    "assigned_versions",
    metadata,
    Column("device", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("assigned_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["device"], ["devices.id"]),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
)

# The roles that admins gave to operators.
operators = Table(
    "operators",
    metadata,
    Column("name", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("model", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("state", Integer, nullable=False),
    Column("phase", LargeBinary, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("ended_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
    Index("rollouts_by_model", "model", "number"),
    sqlite_autoincrement=True,
)

rollout_devices = Table(
    "rollout_devices",
    metadata,
    Column("rollout", Text, primary_key=True),
    Column("device", Text, primary_key=True),
    Column("state", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("from_version", BigInteger, nullable=False),
    Column("fetched_bytes", BigInteger, nullable=False),
    Column("fetch_total_bytes", BigInteger, nullable=False),
    Column("reason", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("ended_us", BigInteger, nullable=False),
    ForeignKeyConstraint(["rollout"], ["rollouts.id"]),
    ForeignKeyConstraint(["device"], ["devices.id"]),
)

# The highest batch taken from each outbox: lower and equal numbers are repeats.
telemetry_epochs = Table(
    "telemetry_epochs",
    metadata,
    Column("device", Text, primary_key=True),
    Column("epoch", Text, primary_key=True),
    Column("acked_sequence", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False),
)

telemetry_points = Table(
    "telemetry_points",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("device", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("unit", Text, nullable=False),
    Column("attributes", Text, nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Column("received_us", BigInteger, nullable=False),
    Index("telemetry_points_by_name", "device", "name", "time_us"),
    Index("telemetry_points_by_age", "received_us"),
    sqlite_autoincrement=True,
)

# Who was issued certificates, or asked for one. `void_until_us`: certificates that end by then count no
# longer.
identities = Table(
    "identities",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("state", Integer, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("conflict_key", LargeBinary, nullable=False),
    Column("refused_key", LargeBinary, nullable=False),
    Column("conflict_us", BigInteger, nullable=False),
    Column("counter", BigInteger, nullable=False),
    Column("stale", Integer, nullable=False),
    Column("notice", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("renewed_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("void_until_us", BigInteger, nullable=False),
)

# Enrolment tokens by their hash; the tokens themselves are kept by nobody here.
tokens = Table(
    "tokens",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
    Column("used_us", BigInteger, nullable=False),
    Column("used_by", Text, nullable=False),
    Column("used_key", LargeBinary, nullable=False),
)

# Signed metadata by role and version. Of roots all are kept, of other roles the newest few.
trust_metadata = Table(
    "trust_metadata",
    metadata,
    Column("role", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
)
