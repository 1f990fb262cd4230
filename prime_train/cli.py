"""The `prime-train` command."""

import sys
from collections.abc import Sequence

from .config import Config
from .settings import ConfigError, load_config, reference_table, shipped
from .verify.sandbox import SandboxUnavailable
from .vllm.errors import ServerError

USAGE = """prime-train COMMAND …

  run CONFIG [--section.key value …] [--dry-run]   train: SFT if the config asks for it, then PRIME; resumes
  sft CONFIG [--section.key value …]               the SFT stage alone
  eval CONFIG [--section.key value …]              accuracy of the newest checkpoint on the held-out prompts
  verify FILE.jsonl [--out SCORES.jsonl]           score a file of responses
  report RUN [RUN …] [--out FILE.png]              draw the curves of runs over each other
  doctor [CONFIG [--section.key value …]]          whether this installation can run that configuration
  keys                                             every configuration key, its default and meaning

CONFIG is a TOML file or the name of a shipped one: {}.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed, 2 refused at start, 130 interrupted and saved."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words else "--help"
    commands = {
        "run": _run, "sft": _sft, "eval": _eval, "verify": _verify, "report": _report, "doctor": _doctor, "keys": _keys,
    }  # fmt: skip
    if command in ("-h", "--help", "help"):
        print(USAGE.format(", ".join(shipped())), end="")
        return 0
    if command not in commands:
        print(f"prime-train: no command {command!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[command](words)
    except ConfigError as error:
        print(f"prime-train: {error}", file=sys.stderr)
        return 2
    except SandboxUnavailable as error:
        print(f"prime-train: code answers cannot be run: {error}", file=sys.stderr)
        return 1
    except ServerError as error:
        print(f"prime-train: {error}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    from . import checks, prime, setup, sft
    from .rundir import completed
    from .view import View

    dry = "--dry-run" in words
    config = _config("run", [word for word in words if word != "--dry-run"])
    if dry:
        print(checks.resolved(config))
    checks.refuse_impossible(config)
    if dry:
        return 0
    setup.keep_freed_memory()
    setup.quiet_transformers()
    view = View()
    progress = completed(config)
    if progress is None:
        if config.model.policy == setup.SFT and sft.train(config, view) is None:
            view.say("stopped; the same command goes on from here")
            return 130
        progress = prime.train(config, view)
    if progress.step < config.run.steps:
        view.say(f"stopped after step {progress.step}, saved in {config.run.dir}; the same command goes on from here")
        return 130
    from .report import draw

    view.say(f"complete: {progress.step} steps in {progress.seconds:.0f} s; curves in {draw([config.run.dir])}")
    return 0


def _sft(words: list[str]) -> int:
    from . import checks, setup, sft
    from .view import View

    config = _config("sft", words)
    checks.refuse_impossible(config)
    setup.keep_freed_memory()
    setup.quiet_transformers()
    view = View()
    directory = sft.train(config, view)
    view.say(f"SFT model in {directory}" if directory else "stopped; the same command goes on from here")
    return 0 if directory else 130


def _eval(words: list[str]) -> int:
    from . import checks, prime, setup
    from .measures import described
    from .view import View

    config = _config("eval", words)
    checks.refuse_impossible(config)
    if config.model.policy == setup.SFT and not setup.sft_directory(config).exists():
        raise ConfigError(
            f"model.policy: no SFT model in {setup.sft_directory(config)} yet; `prime-train run` makes it"
        )
    setup.quiet_transformers()
    step, figures = prime.evaluate_newest(config)
    View().say(f"step {step}: {described(figures)}")
    return 0


def _verify(words: list[str]) -> int:
    from .verify.command import main as verify

    return verify(words)


def _report(words: list[str]) -> int:
    from .report import main as report

    return report(words)


def _doctor(words: list[str]) -> int:
    from .doctor import examine, usable

    findings = []
    for finding in examine(_config("doctor", words) if words else Config()):
        findings.append(finding)
        print(finding, flush=True)
    print("usable" if usable(findings) else "not usable")
    return 0 if usable(findings) else 1


def _keys(words: list[str]) -> int:
    if words:
        raise ConfigError(f"keys takes nothing, found {words[0]}")
    print(reference_table())
    return 0


def _config(command: str, words: list[str]) -> Config:
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{command} needs a configuration: a TOML file or one of {', '.join(shipped())}")
    return load_config(words[0], words[1:])
