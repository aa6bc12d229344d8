"""The command line of every training script: options in, one sentence and an exit code out."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import NoReturn, TypeVar

from train.interrupt import Stopped
from train.options import Options, flag, problems

Parsed = TypeVar("Parsed", bound=Options)


def parse(
    kind: type[Parsed],
    presets: Mapping[str, Parsed],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> Parsed:
    """The options of a command line; ``--preset NAME`` chooses the defaults, first of all.

    Raises:
      SystemExit: for ``--help`` (0), and with one sentence for arguments that mean nothing (2).
    """
    try:
        import tyro
    except ImportError:
        fail(prog, "the scripts need tyro: pip install --group train")
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, given = _preset(given, next(iter(presets)))
    if name not in presets:
        fail(prog, f"--preset {name}: there is no such preset; there are {', '.join(presets)}")
    if unknown := _unknown(given, [field.name for field in dataclasses.fields(kind)]):
        fail(prog, unknown)
    if empty := _empty(given):
        fail(prog, empty)
    shown = f"{description}\n\n--preset NAME sets the defaults below: {', '.join(presets)}."
    with _one_sentence(prog):
        options = tyro.cli(
            kind, default=presets[name], args=given, prog=f"python -m {prog}", description=shown
        )
    if found := problems(options):
        fail(prog, "; ".join(found))
    return options


def _preset(arguments: list[str], default: str) -> tuple[str, list[str]]:
    """Take ``--preset NAME`` or ``--preset=NAME`` out of the arguments.

    >>> _preset(["--steps", "3", "--preset", "tiny"], "large")
    ('tiny', ['--steps', '3'])
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            rest = arguments[i + 1 :]
            if not equals:
                value, rest = (rest[0], rest[1:]) if rest else ("", [])
            return value, arguments[:i] + rest
    return default, arguments


def _unknown(arguments: Sequence[str], names: Collection[str]) -> str:
    """A sentence about the first option that there is not; empty if there is none.

    >>> _unknown(["--steps", "3", "--lr=1"], ["steps", "learning_rate", "length"])
    '--lr: there is no such option; did you mean --learning-rate? --help lists all'
    """
    for argument in arguments:
        given = argument.partition("=")[0]
        name = given.removeprefix("--").replace("-", "_")
        if given.startswith("--") and name.removeprefix("no_") not in (*names, "help"):
            near = " or ".join(flag(x) for x in _near(name, names))
            meant = f"did you mean {near}? " if near else ""
            return f"{given}: there is no such option; {meant}--help lists all"
    return ""


def _empty(arguments: Sequence[str]) -> str:
    """A sentence about the first empty value, which an unset variable of a shell leaves.

    >>> _empty(["--steps", "3", "--out", ""])
    '--out has an empty value: give one, or leave the option out'
    """
    for i, argument in enumerate(arguments):
        named = argument.startswith("--") and argument.endswith("=")
        if named or argument.strip() == "":
            given = argument if named else next(iter(arguments[:i][::-1]), "the first argument")
            return f"{given.rstrip('=')} has an empty value: give one, or leave the option out"
    return ""


def _near(name: str, names: Collection[str]) -> list[str]:
    """Names with these initials, nearly this spelling, or a word of this one; at most three.

    >>> _near("bs", ["batch_size", "b1"]), _near("seq_len", ["length", "seed"])
    (['batch_size'], ['length'])
    """
    initials = [x for x in names if "_" in x and "".join(w[0] for w in x.split("_")) == name]
    spelled = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    words = [x for x in names if _share_a_word(name, x)]
    alike = difflib.get_close_matches(name, words, n=3, cutoff=0.0)
    return list(dict.fromkeys(initials + spelled + alike))[:3]


def _share_a_word(name: str, other: str, shortest: int = 3) -> bool:
    """Whether a word of one begins a word of the other: len and length do."""
    pairs = [sorted((a, b), key=len) for a in name.split("_") for b in other.split("_")]
    return any(len(a) >= shortest and b.startswith(a) for a, b in pairs)


@contextlib.contextmanager
def _one_sentence(prog: str) -> Iterator[None]:
    """Of what tyro says of an error keep the sentence, and leave out box, title and help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stopped:
        if stopped.code:
            fail(prog, _sentence(said.getvalue()))
        raise


def _sentence(box: str) -> str:
    """What stands under the title, up to the next rule.

    >>> _sentence("╭─ Title ─╮\\n│ Two │\\n│ words. │\\n│ ────── │\\n│ More. │\\n╰──╯")
    'Two words.'
    """

    def is_rule(line: str) -> bool:
        return line != "" and not line.strip("─-")

    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    under = itertools.dropwhile(is_rule, lines)
    text = " ".join(itertools.takewhile(lambda line: not is_rule(line), under))
    return re.sub(r"\s+", " ", text).partition("Got errors")[0].strip()


_OUT_OF_MEMORY = (
    "out of memory: more --microbatches, --remat and --loss-chunk need less of it, and a run that "
    "has checkpoints goes on with them"
)
_STOPPED = "stopped before the first step; nothing was saved"


def guarded_main(prog: str, job: Callable[[], int]) -> int:
    """Run `job`; what a user can mend ends in one sentence and exit code 2, not in a traceback."""
    from jax.errors import JaxRuntimeError

    from lbw_optax import GuardExhausted

    # Transformers says on import that it found no PyTorch; here it is for tokenizers only.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with interrupt_ends(prog, _STOPPED):
            return job()
    except Stopped:
        return 130
    except KeyboardInterrupt:
        print(f"{prog}: {_STOPPED}", file=sys.stderr)
        return 130
    except GuardExhausted as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 3
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fail(prog, _OUT_OF_MEMORY)
    except (ValueError, ImportError) as error:
        fail(prog, str(error))
    except OSError as error:
        where = f": {error.filename or 'a file of the run'}"
        fail(prog, f"{error.strerror}{where}" if error.strerror else str(error))


@contextlib.contextmanager
def interrupt_ends(prog: str, sentence: str) -> Iterator[None]:
    """While there is nothing to save, Ctrl-C ends the process at once, with a sentence.

    An exception that a handler raises may be lost in whatever library is at work. Raised while XLA
    compiles, it has also crashed the interpreter at its end.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{prog}: {sentence}\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a job in the background ignores it, and goes on so
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fail(prog: str, sentence: str) -> NoReturn:
    """End the program with one sentence on standard error, and exit code 2."""
    print(f"{prog}: {sentence}", file=sys.stderr)
    raise SystemExit(2)
