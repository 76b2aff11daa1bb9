"""Which versions a device was given, and which roles operators have."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "assigned_versions",
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("assigned_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"]),
        sa.ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
        sa.PrimaryKeyConstraint("device", "model", "version"),
    )
    # What was wanted so far, and what devices said they run of it before anybody was asked who they are.
    op.execute(
        "INSERT INTO assigned_versions (device, model, version, assigned_us) "
        "SELECT device, model, version, 0 FROM desired_models"
    )
    op.execute(
        "INSERT OR IGNORE INTO assigned_versions (device, model, version, assigned_us) "
        "SELECT moved.device, rollouts.model, rollouts.version, 0 FROM rollout_devices AS moved "
        "JOIN rollouts ON rollouts.id = moved.rollout"
    )
    op.execute(
        "INSERT OR IGNORE INTO assigned_versions (device, model, version, assigned_us) "
        "SELECT moved.device, rollouts.model, moved.from_version, 0 FROM rollout_devices AS moved "
        "JOIN rollouts ON rollouts.id = moved.rollout "
        "JOIN versions ON versions.model = rollouts.model AND versions.version = moved.from_version"
    )
    op.create_table(
        "operators",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("changed_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
