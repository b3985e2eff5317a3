"""`saap export`: a checkpoint for other programs and for the hub."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.targets import complete_run, find_run, matching_runs
from tasks.config import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Write a pruned or recovered checkpoint for llama.cpp, for stock classes, or for the hub.",
)
STAGES = {"pruned": "prune", "recovered": "recover"}

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="A checkpoint's folder, or a run: its id, or how that begins or ends.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
VariantOption = Annotated[
    Literal["pruned", "recovered"] | None,
    typer.Option(help="Which checkpoint of the run; the recovered one, if there is one, when absent."),
]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="SAAP_STORE", help="Folder with the artifacts and the warehouse.")
]
STORE = Path("saap_store")


@dataclass(frozen=True)
class Checkpoint:
    """A folder; when a store has it also its manifest, store, and variant in the run `run_id`."""

    folder: Path
    manifest: dict[str, Any] | None = None
    store: Path | None = None
    run_id: str | None = None
    variant: str | None = None


@app.command()
def gguf(
    source: SourceArgument,
    file: Annotated[Path, typer.Argument(help="The GGUF file to write; must not exist.", show_default=False)],
    floats: Annotated[
        Literal["f16", "f32"], typer.Option(help="Type of float tensors; int4 layers are Q4_1 always.")
    ] = "f16",
    variant: VariantOption = None,
    store: StoreOption = STORE,
) -> None:
    """Write one file for llama.cpp: uneven layers, tokenizer, and int4 layers as Q4_1 with our own codes."""
    _refuse_existing(file)
    checkpoint = find_checkpoint(source, variant, store)
    from saap.export.gguf import export_gguf

    done = export_gguf(checkpoint.folder, file, floats=floats)
    counts = ", ".join(f"{count} {kind}" for kind, count in done.tensors.items())
    print(f"{file}: {done.bytes / 1e6:.1f} MB, tensors: {counts}")
    if done.unpacked:
        print(f"{len(done.unpacked)} matrices of codes became {floats}: Q4_1 holds 4 bits in groups of 32, 64, 96 …")


@app.command()
def uniform(
    source: SourceArgument,
    folder: Annotated[Path, typer.Argument(help="The folder to write; must not exist.", show_default=False)],
    round_to: Annotated[
        int, typer.Option("--round-to", min=1, help="Tensor-parallel size that heads and channels are to divide by.")
    ] = 1,
    variant: VariantOption = None,
    store: StoreOption = STORE,
) -> None:
    """Write a stock checkpoint of equal layers, narrower ones filled up with zeros: the same outputs in any program.

    Nothing is filled when the plan is even: run with --set prune.search=uniform --set 'prune.protect=\\[]'.
    """
    checkpoint = find_checkpoint(source, variant, store)
    from saap.export.uniform import export_uniform

    with _new_folder(folder) as draft:
        done = export_uniform(checkpoint.folder, draft, round_to=round_to)
    print(f"{folder}: " + ", ".join(f"{name} {value}" for name, value in done.items()))


@app.command()
def hf(
    source: SourceArgument,
    folder: Annotated[Path | None, typer.Argument(help="The folder to write; must not exist.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload to this repository of the hub, org/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the files and the card.")] = False,
    variant: VariantOption = None,
    store: StoreOption = STORE,
) -> None:
    """Write or upload a checkpoint as a hub repository, its card filled with the metrics of the run."""
    if not (folder or push or dry_run):
        raise ConfigError("say where to: a folder, --push org/name, or --dry-run")
    if push and push.count("/") != 1:
        raise ConfigError(f"--push takes org/name, got '{push}'")
    token = _token() if push and not dry_run else ""
    checkpoint = find_checkpoint(source, variant, store)
    files = {
        str(file.relative_to(checkpoint.folder)): file
        for file in sorted(checkpoint.folder.rglob("*"))
        if _belongs(file)
    }
    card = card_of(checkpoint, push)
    if dry_run:
        for name, file in files.items():
            print(f"{file.stat().st_size:>14,}  {name}")
        print(f"{len(card.encode()):>14,}  README.md\n\n{card}")
        return
    if folder:
        with _new_folder(folder) as draft:
            for name, file in files.items():
                (draft / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, draft / name)  # with the mode of new files, not the store's
            (draft / "README.md").write_text(card, encoding="utf-8")
        print(f"{folder}: {len(files) + 1} files")
    if push:
        print(_upload(files, card, push, token, private))


@app.command()
def mlflow(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run: its id, or how that begins or ends.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    uri: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI",
            help="Tracking server or database, e.g. sqlite:///mlflow.db.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = STORE,
) -> None:
    """Log a run to MLflow: configuration, metrics, losses and the report. Twice is once."""
    from flows.tracking import log_run
    from storage.warehouse import Warehouse

    with Warehouse(store).reading() as connection:
        found = find_run(connection, store, run_id)
    print(f"{found}: run {log_run(store, found, uri)} of MLflow")


def find_checkpoint(source: str, variant: str | None, store: Path) -> Checkpoint:
    """The checkpoint in a folder, or of a run. Raises ConfigError or StorageError when there is none."""
    from storage.artifacts import MANIFEST, ArtifactStore
    from storage.hints import how_to_list
    from storage.warehouse import Warehouse

    folder = Path(source)
    if folder.is_dir():
        if not (folder / MANIFEST).is_file():
            if variant is not None:
                raise ConfigError(f"{folder} is a checkpoint already: --variant says which one of a run")
            return Checkpoint(folder)
        store, stage, key = folder.resolve().parent.parent, folder.resolve().parent.name, folder.resolve().name
        run_id = None
        if variant is not None and stage != STAGES[variant]:
            raise ConfigError(f"{folder} is not the {variant} checkpoint of a run: leave --variant out")
    else:
        stages = [STAGES[variant]] if variant else ["recover", "prune"]
        with Warehouse(store).reading() as connection:
            if matching_runs(connection, source):
                source = find_run(connection, store, source)
            rows = connection.execute(
                "select stage, key from stage_runs where run_id = ? and list_contains(?, stage) order by position desc",
                [source, stages],
            ).fetchall()
        if not rows:
            raise ConfigError(
                f"{source} is neither a folder nor a run with a {variant or 'pruned'} checkpoint in {store.resolve()}: "
                f"{how_to_list(store.resolve())}"
            )
        (stage, key), run_id = rows[0], source
    artifacts = ArtifactStore(store)
    manifest, fault = artifacts.inspect(stage, key, verify=True)  # a damaged checkpoint must not leave the store
    if manifest is None:
        raise ConfigError(
            f"the checkpoint {stage}/{key} is {'damaged: ' + fault if fault else 'gone'}; run again, or saap pull it"
        )
    name = next((name for name, its in STAGES.items() if its == stage), None)
    return Checkpoint(artifacts.path(stage, key), manifest, artifacts.root, run_id or manifest["run_id"], name)


def card_of(checkpoint: Checkpoint, place: str | None) -> str:
    """README.md of a checkpoint, with the metrics and speeds that its run has in the warehouse."""
    from saap.export.model_card import model_card
    from storage.artifacts import ArtifactStore
    from storage.warehouse import Warehouse
    from tasks.model_card import origin_of

    if checkpoint.manifest is None or checkpoint.store is None:
        card = checkpoint.folder / "README.md"
        if not card.is_file():
            raise ConfigError(f"{checkpoint.folder} has no README.md and is in no store, so nothing is known of it")
        return card.read_text(encoding="utf-8")
    asked = [checkpoint.run_id, checkpoint.variant]
    with Warehouse(checkpoint.store).reading() as connection:
        metrics = connection.execute(
            "select benchmark, metric, value, stderr, n, protocol, data from metrics "
            "where run_id = ? and variant = ? order by all",
            asked,
        )
        metric_rows = _rows(metrics)
        speed = connection.execute(
            "select variant, parameters, active_parameters, weight_bytes, tokens_per_s, "
            "decode_ratio as ratio_to_dense, prefill_tokens_per_s, dtype, device, threads "
            "from speed where run_id = ? and starts_with(variant, ?) "
            "order by variant",
            asked,
        )
        speed_rows = _rows(speed)
        if all(row["active_parameters"] in (None, row["parameters"]) for row in speed_rows):
            speed_rows = [{name: row[name] for name in row if name != "active_parameters"} for row in speed_rows]
    origin = origin_of(ArtifactStore(checkpoint.store), {**checkpoint.manifest, "run_id": checkpoint.run_id})
    return model_card(checkpoint.folder, origin, metrics=metric_rows, speed=speed_rows, place=place)


def _rows(result: Any) -> list[dict[str, Any]]:
    columns = [column[0] for column in result.description]
    return [dict(zip(columns, row, strict=True)) for row in result.fetchall()]


def _belongs(file: Path) -> bool:
    """Leave out what only our store uses: the manifest names paths of this machine, the card has the training."""
    return file.is_file() and file.name not in ("manifest.json", "training.parquet", "README.md")


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise ConfigError("no token for the hub: set HF_TOKEN or run `hf auth login`; --dry-run shows what would go")
    return token


def _upload(files: dict[str, Path], card: str, repository: str, token: str, private: bool) -> str:
    """One commit of all files; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    from saap.errors import first_line

    hub = HfApi(token=token)
    operations = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        done = hub.create_commit(repository, operations, commit_message="Upload by saap export hf")
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet's
        raise ConfigError(f"cannot upload to {repository}: {first_line(error)}") from error
    return str(done.commit_url)


def _refuse_existing(place: Path) -> None:
    if place.exists():
        raise ConfigError(f"{place} exists already: name another")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` when the block ends without an error: whole or not at all."""
    _refuse_existing(folder)
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {folder.absolute().parent} to write {folder.name} in")
    draft = folder.absolute().with_name(f".draft-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir()
        yield draft
        draft.rename(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
