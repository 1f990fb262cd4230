"""The `prime-train` command."""

import faulthandler
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .config.keys import Config
from .config.settings import ConfigError, load_config, shipped
from .rollout.vllm.errors import ServerError
from .run.saved import CheckpointError, CheckpointRefused
from .verify.sandbox import SandboxUnavailable

if TYPE_CHECKING:
    from .models.distributed import World
    from .run.checkpoints import Progress
    from .run.interrupt import Interrupts
    from .show.view import View

USAGE = """prime-train COMMAND …

  run CONFIG [--section.key value …]    train: SFT if the config asks for it,
                                        then PRIME; resumes
      [--dry-run]                       print the resolved config and its plan
      [--force]                         run what does not fit, too
  sft CONFIG [--section.key value …]    the SFT stage alone
  eval CONFIG [--section.key value …]   accuracy of the newest checkpoint on the
                                        held-out prompts
  plan CONFIG [--section.key value …]   will it fit, how long will a step take;
      [--gpus N] [--memory GIB]         here, or on N GPUs of so much memory
      [--host-memory GIB]               each, in hosts of so much,
      [--tflops T] [--bandwidth GB/S]   that achieve so much
  export CONFIG|RUN_DIR --out DIR       a checkpoint's policy or PRM, for
      [--model prm]                     transformers and vLLM
  verify FILE.jsonl [--out FILE.jsonl]  score a file of responses
  report RUN [RUN …] [--out FILE.png]   draw the curves of runs over each other
  doctor [CONFIG [--section.key v …]]   whether this installation can run that
                                        configuration
  keys [SECTION | KEY | WORD …]         every configuration key, or those that
                                        have all the words
  metrics [GROUP | METRIC | WORD …]     the same of every metric of a run
      [--markdown]                      all keys, or all metrics, as a page

CONFIG is a TOML file or the name of a shipped one:
  {}.
"""
OWN_HELP = ("export", "verify", "report")
"""Commands that print their own options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, or stopped by SIGTERM and saved; 1 failed; 2 refused at start; 130 interrupted and saved."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words else "--help"
    commands = {
        "run": _run, "sft": _sft, "eval": _eval, "plan": _plan, "export": _export, "verify": _verify,
        "report": _report, "doctor": _doctor, "keys": _keys, "metrics": _metrics,
    }  # fmt: skip
    asked = command in commands and command not in OWN_HELP and not {"-h", "--help"}.isdisjoint(words)
    if asked or command in ("-h", "--help", "help"):
        print(USAGE.format(", ".join(shipped())), end="")
        return 0
    if command not in commands:
        print(f"prime-train: no command {command!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    if not faulthandler.is_enabled():
        faulthandler.enable()  # where NCCL ends a process that waits in vain, it shows in which function
    try:
        return commands[command](words)
    except (ConfigError, CheckpointRefused) as error:
        print(f"prime-train: {error}", file=sys.stderr)
        return 2
    except SandboxUnavailable as error:
        print(f"prime-train: code answers cannot be run: {error}", file=sys.stderr)
        return 1
    except (ServerError, CheckpointError) as error:
        print(f"prime-train: {error}", file=sys.stderr)
        return 1


def _run(words: list[str]) -> int:
    from . import checks
    from .plan import command
    from .run import setup
    from .run.directory import completed
    from .run.interrupt import Interrupts
    from .show.view import View

    dry, force = "--dry-run" in words, "--force" in words
    config = _config("run", [word for word in words if word not in ("--dry-run", "--force")])
    if dry:
        print(checks.resolved(config))
    checks.refuse_impossible(config)
    if dry:
        print(command.dry_run(config))
        return 0
    setup.keep_freed_memory()
    setup.quiet_transformers()
    progress = completed(config)
    note = command.refuse_too_large(config, force=force) if progress is None else None
    with Interrupts() as interrupts:
        with setup.joined_world(config) as world:
            view = View(quiet=not world.leads)
            if note:
                view.warn(note)
            progress = progress or _trained(config, view, world, interrupts)
            if progress is None or progress.step < config.run.steps or not progress.evaluated:
                place = f" after step {progress.step}, saved in {config.run.dir}" if progress else ""
                view.say(f"stopped{place}; the same command goes on from here")
                return _stopped(world, interrupts)
        if world.leads:
            from .show.report import draw

            view.say(f"complete: {progress.step} steps in {progress.seconds:.0f} s; curves in {draw([config.run.dir])}")
    return 0


def _trained(config: Config, view: "View", world: "World", interrupts: "Interrupts") -> "Progress | None":
    """Where PRIME stands at its end, or where it was stopped; None if that was before it began."""
    from . import prime, sft
    from .run import setup

    if config.model.policy == setup.SFT:
        directory = sft.train(config, view, world, interrupts)
        if directory is None or world.any(interrupts.requested):
            return None
    return prime.train(config, view, world, interrupts)


def _sft(words: list[str]) -> int:
    from . import checks, sft
    from .run import setup
    from .run.interrupt import Interrupts
    from .show.view import View

    config = _config("sft", words)
    checks.refuse_impossible(config)
    setup.keep_freed_memory()
    setup.quiet_transformers()
    with Interrupts() as interrupts, setup.joined_world(config) as world:
        view = View(quiet=not world.leads)
        directory = sft.train(config, view, world, interrupts)
        view.say(f"SFT model in {directory}" if directory else "stopped; the same command goes on from here")
        return 0 if directory else _stopped(world, interrupts)


def _eval(words: list[str]) -> int:
    from . import checks, prime
    from .run import setup
    from .show.measures import described
    from .show.view import View

    config = _config("eval", words)
    checks.refuse_impossible(config)
    if config.model.policy == setup.SFT and not setup.sft_directory(config).exists():
        raise ConfigError(
            f"model.policy: no SFT model in {setup.sft_directory(config)} yet; `prime-train run` makes it"
        )
    setup.quiet_transformers()
    with setup.joined_world(config) as world:
        step, figures = prime.evaluate_newest(config, world)
        View(quiet=not world.leads).say(f"step {step}: {described(figures)}")
    return 0


def _plan(words: list[str]) -> int:
    from .plan.command import main as plan
    from .run import setup

    setup.quiet_transformers()
    return plan(words, lambda rest: _config("plan", rest))


def _export(words: list[str]) -> int:
    from .run.export import main as export

    return export(words)


def _stopped(world: "World", interrupts: "Interrupts") -> int:
    """After a request to stop that was met: SIGTERM, of a scheduler that wants the machine, is no failure."""
    return 0 if world.any(interrupts.last == signal.SIGTERM) else 130


def _verify(words: list[str]) -> int:
    from .verify.command import main as verify

    return verify(words)


def _report(words: list[str]) -> int:
    from .show.report import main as report

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
    from . import reference

    reference.show(reference.keys(), words)
    return 0


def _metrics(words: list[str]) -> int:
    from . import reference

    reference.show(reference.metrics(), words)
    return 0


def _config(command: str, words: list[str]) -> Config:
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{command} needs a configuration: a TOML file or one of {', '.join(shipped())}")
    return load_config(words[0], words[1:])
