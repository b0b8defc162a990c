"""Facts about a run that its folder tells, read without a lock while it may still be under way.

What is missing or damaged becomes a line among the run's notes; the rest is shown.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import checkpoint as ckpt
from checkpoint import Checkpoint
from config import MAX_BYTES, Config, config_from_dict
from evaluation.run_tables import Curves, Evaluation, read_curves, read_evaluation, read_likelihood_curves
from harness.errors import InputError, one_line, reason
from harness.files import RefusedFile, read_text
from harness.folder import CONFIG_NAME, RECORD_NAME
from harness.stopping import safe_point
from training.expected import Corpus, Curve, curve_on
from training.loop import COLUMNS, LIKELIHOOD_FILE
from vocoder import config_of, find_checkpoint

MAX_RECORD_BYTES = 2**26
MAX_EVALUATIONS = 20  # files, the newest
LOSSES_FILE = "losses.csv"
NO_CONFIG = f"put a {CONFIG_NAME} beside it"  # remedy

Result = TypeVar("Result")


@dataclass
class Run:
    """A run's folder, and what it tells; None or empty where it does not."""

    folder: Path
    label: str
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)  # of the config, by section.key
    config: Config | None = None
    records: list[dict[str, Any]] = field(default_factory=list)  # a dict for each start
    curves: Curves | None = None
    likelihoods: Mapping[str, Any] = field(default_factory=dict)  # [N, 2] by test list
    expected: Curve | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)

    @property
    def directory(self) -> Path | None:
        """Folder in which the run was started, to which the paths of its config are relative."""
        place = self.records[-1].get("directory") if self.records else None
        return Path(place) if isinstance(place, str) else None

    def attempt(self, what: str, read: Callable[[], Result]) -> Result | None:
        """Result of `read`, or None and a note of why there is none."""
        try:
            return read()
        except OSError as error:
            safe_point()  # an interrupt can look like a damaged file
            self.note(f"{what}: {error.strerror or reason(error)}")
        except ValueError as error:  # InputError and RefusedFile too
            safe_point()
            self.note(f"{what}: {reason(error)}")
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or "memory" in str(error)):
                raise
            self.note(f"{what}: not enough memory")
        return None

    def note(self, text: str) -> None:
        """Add a line to the notes."""
        self.notes.append(one_line(text, 500))

    def checkpoint(self) -> tuple[Checkpoint, Config] | None:
        """The newest whole checkpoint with its config; None, and a note, where there is none."""
        if not self.checkpoints:
            self.note("no checkpoint yet: no audio, z, flows or weights")
            return None
        found = self.attempt("checkpoint", lambda: find_checkpoint(self.folder, self.note))
        config = found and self.attempt("checkpoint", lambda: config_of(found, self.config, NO_CONFIG))
        return (found, config) if config else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs of folders, each once. InputError where one is not a run's folder."""
    places = list({path.resolve(): path for path in reversed(list(map(Path, folders)))}.values())[::-1]
    names = [path.resolve().name for path in places]
    return [
        read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(places, names, strict=True)
    ]


def read_run(folder: Path, label: str) -> Run:
    """Facts about a run. InputError where the folder is not that of one."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}, expected the folder of a run, <output_directory>/<model_name>")
    run = Run(folder, label, checkpoints=ckpt.list_checkpoints(folder))
    present = [name for name in (LOSSES_FILE, CONFIG_NAME, RECORD_NAME) if (folder / name).exists()]
    if not present and not run.checkpoints:
        raise InputError(
            f"{folder}: not the folder of a run, it has no {LOSSES_FILE}, {CONFIG_NAME}, {RECORD_NAME} or checkpoint; "
            "expected <output_directory>/<model_name>"
        )
    _read_texts(run)
    _read_tables(run)
    return run


def _read_texts(run: Run) -> None:
    run.records = run.attempt(RECORD_NAME, lambda: _records(run)) or []
    sections = run.attempt(CONFIG_NAME, lambda: _config_values(run.folder / CONFIG_NAME))
    if sections is None and run.records:
        sections = run.records[-1].get("config")
    if not isinstance(sections, dict):
        return
    run.values = flat(sections)
    run.config = run.attempt(CONFIG_NAME, lambda: config_from_dict(sections))
    corpus = [run.records[-1].get(name) for name in ("training_clips", "training_samples")] if run.records else []
    if run.config is not None and corpus and all(type(number) is int for number in corpus):
        run.expected = curve_on(run.config, Corpus("", *corpus))


def _records(run: Run) -> list[dict[str, Any]]:
    lines = read_text(run.folder / RECORD_NAME, MAX_RECORD_BYTES, errors="replace").split("\n")
    found, damaged = [], 0
    for line in lines[:-1]:  # behind the last line end is nothing, or a line that is being written
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and found and "started" not in record:  # what turned out after the start
            found[-1] |= {name: value for name, value in record.items() if name not in found[-1]}
        elif isinstance(record, dict):
            found.append(record)
        elif line.strip():
            damaged += 1
    if damaged:
        run.note(f"{RECORD_NAME}: {damaged} line(s) cannot be read")
    return found


def _config_values(path: Path) -> Any:
    try:
        sections = json.loads(read_text(path, MAX_BYTES))
    except RecursionError:
        raise RefusedFile("nested too deeply to be a config") from None
    if not isinstance(sections, dict):
        raise RefusedFile("expected an object with the sections of a config")
    return sections


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config by section.key."""
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


def _read_tables(run: Run) -> None:
    run.curves = run.attempt(LOSSES_FILE, lambda: read_curves(run.folder / LOSSES_FILE, COLUMNS[1:]))
    if run.curves is not None and run.curves.unreadable:
        run.note(f"{LOSSES_FILE}: {run.curves.unreadable:,} row(s) cannot be read and are left out")
    if (run.folder / LIKELIHOOD_FILE).exists():
        path = run.folder / LIKELIHOOD_FILE
        run.likelihoods = run.attempt(LIKELIHOOD_FILE, lambda: read_likelihood_curves(path)) or {}
    else:
        run.note(f"no {LIKELIHOOD_FILE}: no curve of the test likelihood")
    paths = run.attempt("evaluation", lambda: _newest_tables(run.folder / "evaluation")) or []
    for path in paths:
        if (found := run.attempt(f"evaluation/{path.name}", lambda path=path: read_evaluation(path))) is not None:
            run.evaluations.append(found)


def _newest_tables(folder: Path) -> list[Path]:
    """The newest files of evaluations, by the iteration in their names."""
    paths = [path for path in folder.glob("*.csv") if not path.name.startswith(".")] if folder.is_dir() else []
    by_iteration = sorted(paths, key=lambda path: [int(number[-18:]) for number in re.findall(r"[0-9]+", path.name)])
    return by_iteration[-MAX_EVALUATIONS:][::-1]
