"""`sluice model`: push, list, show, alias, retire."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from rich.text import Text

from fleet.cli import documents, tables
from fleet.cli.arguments import NAME, PAIR, REF, VERSION, Ref, unique
from fleet.cli.command import Group
from fleet.cli.progress import progress_bar
from fleet.cli.session import Session, interruptible, line
from fleet.cli.trust_options import passphrase_option, signing_for, trust_option
from fleet.client import ControlClient
from fleet.publish import Published, prepare, publish
from fleet.recipe import Recipe, VariantRecipe, load_recipe
from fleet.signing import Signing
from sluice.api.v1 import registry_pb2
from updater.errors import SluiceError
from updater.manifest import Manifest

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False, readable=True)


@click.group("model", cls=Group)
def model() -> None:
    """Publish models and look at their versions."""


@model.command(
    "push",
    short_help="Publish a model file, or a model.yaml, as the next version.",
    examples=[
        (
            "One file for every board; boxes check it with golden inputs first.",
            "sluice model push detector.onnx --name detector --golden golden.npz",
        ),
        ("Several variants, described in a file.", "sluice model push -f model.yaml"),
        (
            "Remember where it came from.",
            'sluice model push m.onnx --name m --annotation commit="$(git rev-parse HEAD)"',
        ),
    ],
)
@click.argument("file", type=_FILE, required=False)
@click.option("-f", "--recipe", "recipe_path", type=_FILE, metavar="model.yaml", help="Variants, as YAML.")
@click.option("--name", type=NAME, help="The model's name. Needed with FILE.")
@click.option("--golden", type=_FILE, help="Golden inputs and outputs, .npz. Only with FILE.")
@click.option(
    "--version",
    "number",
    type=VERSION,
    help="The number it must get. Default: the next one.",
)
@click.option("--annotation", type=PAIR, multiple=True, help="Kept with the version; may be repeated.")
@trust_option
@passphrase_option
@click.pass_obj
def push(
    session: Session,
    file: Path | None,
    recipe_path: Path | None,
    name: str | None,
    golden: Path | None,
    number: int | None,
    annotation: tuple[tuple[str, str], ...],
    trust_directory: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Publish a model file, or the variants of a model.yaml, as the next version.

    FILE is ONNX or TFLite; its format is found by its content, and external data files beside it come
    along. Content equal to the latest version's makes nothing new. An upload that was cut off goes on where
    it stopped when the command is run again. Where trust is set up, the version is signed with the keys here.
    """
    recipe = _recipe(file, recipe_path, name, golden)
    recipe = replace(recipe, annotations={**recipe.annotations, **unique(annotation, "--annotation")})
    resume = "what was uploaded is kept: run the same command again to go on"
    with interruptible(resume), session.client() as client:
        draft = prepare(recipe)
        with progress_bar() as step:
            signing = signing_for(client, trust_directory, passphrase_file)
            sign = signing.sign_version if signing is not None else None
            published = publish(client, draft, version=number, progress=step, sign=sign)
        if signing is not None:
            _keep(session, signing)
    _show_published(session, published)


def _keep(session: Session, signing: Signing) -> None:
    """Takes what was just published into the trust directory: a control plane that is restored from a backup
    gets it back from there.
    """
    try:
        signing.refresh()
    except SluiceError as error:
        session.note(f"published, but the copy in {signing.directory.path} is older: {error}")


def _recipe(file: Path | None, recipe_path: Path | None, name: str | None, golden: Path | None) -> Recipe:
    if recipe_path is not None:
        if file is not None or name is not None or golden is not None:
            raise click.UsageError("-f model.yaml says it all: leave out FILE, --name and --golden")
        return load_recipe(recipe_path)
    if file is None:
        raise click.UsageError("give a model FILE with --name, or -f model.yaml")
    if name is None:
        raise click.UsageError(f"give the model's name: sluice model push {file} --name NAME")
    return Recipe(model=name, variants=(VariantRecipe(file=file, golden=golden),))


def _show_published(session: Session, published: Published) -> None:
    manifest = published.manifest
    ref = f"{manifest.model}@{manifest.version}"
    total = sum(file.size for file in manifest.files().values())
    document = {
        "model": manifest.model,
        "version": manifest.version,
        "created": published.created,
        "manifest_digest": published.digest,
        "variants": [variant.name for variant in manifest.variants],
        "size_bytes": total,
        "uploaded_files": published.uploaded_files,
        "uploaded_bytes": published.uploaded_bytes,
    }
    if not published.created:
        session.result(document, line(f"already published as {ref}; nothing new was made"))
        return
    variants = ", ".join(variant.name for variant in manifest.variants)
    brought = f"{tables.size(total)}, of which {tables.size(published.uploaded_bytes)} uploaded"
    session.result(
        document,
        line(f"published {ref} ({variants}; {brought})"),
        line(f"next: sluice rollout start {ref} --watch"),
    )


@model.command(
    "list",
    examples=[
        ("All models.", "sluice model list"),
        ("The versions of one.", "sluice model list detector"),
    ],
)
@click.argument("name", type=NAME, required=False)
@click.pass_obj
def list_(session: Session, name: str | None) -> None:
    """List the models, or the versions of one model, newest first."""
    with session.client() as client:
        if name is None:
            _list_models(session, client)
        else:
            _list_versions(session, client, name)


def _list_models(session: Session, client: ControlClient) -> None:
    models = list(client.list_models())
    rows = [
        (
            found.name,
            str(found.latest_version or "-"),
            tables.pairs(found.aliases),
            tables.age(found.create_time),
        )
        for found in models
    ]
    shown = tables.Rows(("MODEL", "LATEST", "ALIASES*", "CREATED"), rows, right=("LATEST",))
    empty = line("no models yet; publish one: sluice model push FILE --name NAME")
    session.result({"models": [documents.model(found) for found in models]}, shown if models else empty)


def _list_versions(session: Session, client: ControlClient, name: str) -> None:
    found = client.get_model(name)
    versions = list(client.list_versions(name))
    rows = [
        (
            str(entry.version),
            tables.size(entry.size_bytes),
            ", ".join(entry.variants),
            _marks(found, entry),
            tables.age(entry.create_time),
        )
        for entry in versions
    ]
    shown = tables.Rows(
        ("VERSION", "SIZE", "VARIANTS*", "NOTE*", "PUBLISHED"), rows, right=("VERSION", "SIZE")
    )
    session.result(
        {"model": documents.model(found), "versions": [documents.version(entry) for entry in versions]}, shown
    )


def _marks(found: registry_pb2.Model, version: registry_pb2.Version) -> str:
    marks = [alias for alias, number in sorted(found.aliases.items()) if number == version.version]
    return ", ".join(marks + (["retired"] if version.retired else []))


@model.command(
    "show",
    examples=[
        ("The latest version.", "sluice model show detector"),
        ("By number or alias.", "sluice model show detector@3\nsluice model show detector:stable"),
    ],
)
@click.argument("ref", type=REF, metavar=REF.name)
@click.pass_obj
def show(session: Session, ref: Ref) -> None:
    """Show one version: its variants, files and digests."""
    with session.client() as client:
        found = client.get_model(ref.model)
        version = ref.get(client)
    manifest = Manifest.parse(version.manifest)
    marks = _marks(found, version)
    head = tables.details(
        (
            ("version", f"{version.model}@{version.version}" + (f" ({marks})" if marks else "")),
            ("manifest", version.manifest_digest),
            ("published", f"{documents.time_text(version.create_time)} ({tables.age(version.create_time)})"),
            ("size", tables.size(version.size_bytes)),
            ("floor", str(manifest.floor)),
            ("annotations", tables.pairs(manifest.annotations)),
        )
    )
    variants = tables.Rows(
        ("VARIANT", "FORMAT", "PRECISION", "RUNTIME*", "BOARDS*"),
        [
            (
                variant.name,
                variant.format,
                variant.precision or "-",
                variant.runtime or "any",
                ", ".join(variant.boards) or "any",
            )
            for variant in manifest.variants
        ],
    )
    files = tables.Rows(
        ("VARIANT", "FILE*", "ROLE", "SIZE", "SHA-256"),
        [
            (variant.name, file.path, file.role, tables.size(file.size), tables.short_digest(file.digest))
            for variant in manifest.variants
            for file in variant.files
        ],
        right=("SIZE",),
    )
    document = {"model": documents.model(found), "version": documents.version(version, manifest=True)}
    session.result(document, head, Text(), variants, Text(), files)


@model.command(
    "alias",
    examples=[
        ("Let stable mean version 3.", "sluice model alias detector stable 3"),
        ("Take the alias away.", "sluice model alias detector canary --remove"),
    ],
)
@click.argument("name", type=NAME)
@click.argument("alias", type=NAME, metavar="ALIAS")
@click.argument("version", type=VERSION, required=False)
@click.option("--remove", is_flag=True, help="Remove the alias.")
@click.pass_obj
def alias_(session: Session, name: str, alias: str, version: int | None, remove: bool) -> None:
    """Point an alias such as stable or canary at a version."""
    if (version is None) != remove:
        raise click.UsageError("give the VERSION that the alias is to mean, or --remove")
    with session.client() as client:
        changed = client.set_alias(name, alias, version or 0)
    told = f"{name}:{alias} is removed" if remove else f"{name}:{alias} is now {name}@{version}"
    session.result({"model": documents.model(changed)}, line(told))


@model.command(
    "retire",
    examples=[("Bar a bad version from new rollouts.", "sluice model retire detector@4")],
)
@click.argument("ref", type=REF, metavar="NAME@V")
@click.pass_obj
def retire(session: Session, ref: Ref) -> None:
    """Bar a version from new rollouts. Devices that run it keep it."""
    if not ref.version:
        raise click.UsageError(f"say which version: sluice model retire {ref.model}@V")
    with session.client() as client:
        version = client.retire_version(ref.model, ref.version)
    session.result(
        {"version": documents.version(version)},
        line(f"{ref} is retired: no new rollout takes it; devices that run it keep it"),
    )
