"""Every metric that a run writes, with its unit and what it says: the source of `prime-train metrics`.

`measures` computes them. A family, such as time/STAGE, is one entry, whose word in capitals stands for many.
"""

import re
from dataclasses import dataclass

PLACEHOLDER = re.compile("[A-Z]+")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    unit: str
    meaning: str
    """What is measured, and what a good or a bad value is."""
    only_if: str = ""
    """Where it is not written whenever its group is: what must hold, too."""
    values: tuple[str, ...] = ()
    """Of a family: all that its placeholder stands for."""

    @property
    def placeholder(self) -> str:
        """Of a family: the word that stands for its values."""
        return "".join(PLACEHOLDER.findall(self.name))

    @property
    def names(self) -> tuple[str, ...]:
        """As they stand in a record."""
        return tuple(PLACEHOLDER.sub(value, self.name) for value in self.values) or (self.name,)


@dataclass(frozen=True, slots=True)
class MetricGroup:
    """Metrics with a prefix in common."""

    prefix: str
    meaning: str
    when: str
    """When its metrics are written."""
    metrics: tuple[Metric, ...]


RECORDS = """A line of metrics.jsonl is one step: `step`, and metrics by name. A value that is not finite is null there.
Step 0 is the evaluation before the first step. A resumed run forgets the steps after its checkpoint and writes them
again. The SFT stage has a metrics.jsonl of its own in sft/. TensorBoard and Weights & Biases get the same names."""

PRIME_STEP = "every PRIME step"
WITH_BATCH = "every PRIME step that kept a prompt"
WITH_PRM = "every PRIME step that kept a prompt, with a PRM (`advantage.process_coef` above 0)"
PRM_LEARNS = "`prm.update` is not `none`"
ANY = "it is not 0"
ANY_STEP = "every step, of PRIME and of SFT"

STAGES = ("rollout", "score", "prm", "policy", "refresh", "eval", "checkpoint", "sft")
TRAINED_STAGES = ("score", "prm", "policy", "sft")
"""Those whose model FLOPs are counted."""

METRICS: tuple[MetricGroup, ...] = (
    MetricGroup(
        "eval",
        "Accuracy on held-out prompts: the mean outcome of responses to them.",
        "before the first PRIME step, every `eval.every` steps, after the last",
        (
            Metric("eval/greedy", "share", "Of one response a prompt, decoded greedily."),
            Metric(
                "eval/sampled",
                "share",
                "Of `eval.samples` responses a prompt at `rollout.temperature`, from the same seed each time.",
                only_if="`eval.samples` is above 0",
            ),
        ),
    ),
    MetricGroup(
        "accuracy",
        "Mean outcome of the step's training prompts, whose responses are sampled.",
        PRIME_STEP,
        (
            Metric(
                "accuracy/before_filter", "share", "Of all prompts sampled, kept or not. It should rise over steps."
            ),
            Metric(
                "accuracy/after_filter",
                "share",
                "Of the prompts kept; 0 where none was. It lies between `filter.low` and `filter.high` whatever the "
                "policy learns.",
            ),
        ),
    ),
    MetricGroup(
        "filter",
        "What became of the step's prompts.",
        PRIME_STEP,
        (
            Metric(
                "filter/seen",
                "prompts",
                "Sampled. Many more than were kept: the data is too easy or too hard for the policy, and sampling "
                "takes so much longer.",
            ),
            Metric(
                "filter/kept",
                "prompts",
                "Trained on. Fewer than `rollout.prompts` are warned of; at 0 nothing is trained in the step.",
            ),
            Metric(
                "filter/REASON",
                "prompts",
                "Dropped: mean outcome below `filter.low` (too_hard) or above `filter.high` (too_easy), a response "
                "cut off (truncated, if `filter.drop_truncated`), passed when the batch was full (surplus).",
                only_if=ANY,
                values=("too_hard", "too_easy", "truncated", "surplus"),
            ),
        ),
    ),
    MetricGroup(
        "response",
        "Length of responses, the end of sequence included.",
        PRIME_STEP,
        (
            Metric(
                "response/truncated",
                "share",
                "Cut off at `rollout.max_tokens`, of all responses sampled. Such a response seldom has an answer.",
            ),
            Metric("response/length", "tokens", "Mean of the responses to kept prompts.", only_if="a prompt was kept"),
        ),
    ),
    MetricGroup(
        "verify",
        "What the verifier made of all responses sampled.",
        PRIME_STEP,
        (
            Metric(
                "verify/STATUS",
                "responses",
                "Scored, right or wrong (ok); out of time in whole or in part (timeout); scored 0 because the "
                "verifier failed (error). Errors are a fault of the data or the verifier, named in the log. Code "
                "that has no sandbox to run in ends the run instead.",
                only_if=ANY,
                values=("ok", "timeout", "error"),
            ),
        ),
    ),
    MetricGroup(
        "rollout",
        "Where the batch comes from.",
        PRIME_STEP,
        (
            Metric(
                "rollout/lag",
                "steps",
                "By how many the weights that sampled the batch are older than the policy that trains on it; above 0 "
                "with `rollout.ahead` alone.",
            ),
        ),
    ),
    MetricGroup(
        "sampler",
        "Sampler against trainer: ratio = π_old / π_sampler of each response token, which is 1 where they agree.",
        WITH_BATCH,
        (
            Metric(
                "sampler/kl",
                "nats a token",
                "KL(sampler ‖ trainer), the k3 estimate ratio − 1 − log ratio. Near 0 where they agree.",
            ),
            Metric(
                "sampler/ratio_mean",
                "ratio",
                "Mean over tokens. Above 1.1 it is warned of: then the sampler is not the policy that is trained.",
            ),
            Metric("sampler/ratio_max", "ratio", "The largest ratio of a token."),
            Metric(
                "sampler/clipped", "share", "Tokens whose ratio is above `rollout.importance_clamp`; 0 without a clamp."
            ),
        ),
    ),
    MetricGroup(
        "prm",
        "Whether the PRM tells right from wrong, as its rewards are taken (before its update, unless `prm.update` is "
        "`before`), and that update.",
        WITH_PRM,
        (
            Metric(
                "prm/pairwise_accuracy",
                "share",
                "How often, of two responses to a prompt, the better one has the higher sum of rewards, weighted by "
                "the difference in outcome. 0.5 is chance, or no two outcomes in any group. It should stay above.",
            ),
            Metric(
                "prm/sign_accuracy",
                "share",
                "Responses whose sum of rewards is positive exactly if their outcome is at least 0.5.",
            ),
            Metric(
                "prm/loss",
                "nats",
                "Mean over mini-batches. It begins at ln 2 = 0.693 where the PRM begins as the reference.",
                only_if=PRM_LEARNS,
            ),
            Metric(
                "prm/grad_norm", "norm", "Mean over mini-batches, before the bound `prm.grad_clip`.", only_if=PRM_LEARNS
            ),
        ),
    ),
    MetricGroup(
        "reward",
        "Process rewards over β, which are log-ratios log π_prm − log π_ref, before `prm.max_log_ratio` bounds them.",
        WITH_PRM,
        (
            Metric(
                "reward/right",
                "nats a token",
                "Mean over responses with an outcome of at least 0.5, 0 where there is none. It should come to lie "
                "above reward/wrong.",
            ),
            Metric("reward/wrong", "nats a token", "Mean over the others, 0 where there is none."),
            Metric(
                "reward/rare_wrong",
                "nats a token",
                "Mean over tokens of wrong responses that are rare under the reference (p below 0.05), 0 where there "
                "is none. It should be negative: above 0, rare tokens of failing responses collect reward, which is "
                "process-reward hacking. `advantage.process_coef`, `prm.max_log_ratio` and `prm.lr` matter then.",
            ),
            Metric(
                "reward/max_log_ratio",
                "nats",
                "The largest |log-ratio| of a token; 0 while the PRM is still the reference.",
            ),
        ),
    ),
    MetricGroup(
        "advantage",
        "What the policy's advantages are made of.",
        WITH_BATCH,
        (
            Metric(
                "advantage/process_share",
                "share",
                "Mean |process| / (mean |process| + mean |outcome|), coefficients included, before whitening; 0 "
                "without a PRM. Near 1 outcomes hardly count.",
            ),
        ),
    ),
    MetricGroup(
        "policy",
        "The policy and its update. Means are over tokens, those of losses and norms over mini-batches.",
        WITH_BATCH,
        (
            Metric(
                "policy/entropy",
                "nats a token",
                "At `rollout.temperature`, before the update. Near 0 nothing new is sampled any more.",
            ),
            Metric(
                "policy/loss",
                "loss",
                "PPO's, with the entropy and KL terms. It does not show progress: see accuracy and eval.",
            ),
            Metric("policy/grad_norm", "norm", "Before the bound `policy.grad_clip`."),
            Metric(
                "policy/clip_fraction", "share", "Tokens where the clipped term of PPO's loss is the one that counts."
            ),
            Metric(
                "policy/kl",
                "nats a token",
                "KL of the old policy from the new during the update, the k3 estimate; about 0 with one optimizer "
                "step a batch.",
            ),
            Metric("policy/ratio_max", "ratio", "The largest π_new / π_old of a token."),
        ),
    ),
    MetricGroup(
        "skipped",
        "Optimizer steps left out because loss or gradient was not finite. Should be 0; otherwise it is warned of, "
        "and the batch is in nonfinite/.",
        WITH_BATCH,
        (
            Metric("skipped/policy", "optimizer steps", "Of the policy."),
            Metric("skipped/prm", "optimizer steps", "Of the PRM.", only_if="there is a PRM that learns"),
        ),
    ),
    MetricGroup(
        "sft",
        "Supervised fine-tuning.",
        "every SFT step, in sft/metrics.jsonl",
        (
            Metric("sft/loss", "nats a token", "Mean −log p of the answers' tokens. It should fall."),
            Metric("sft/grad_norm", "norm", "Before it is bounded to 1."),
            Metric("sft/lr", "rate", "Learning rate of the step."),
        ),
    ),
    MetricGroup(
        "time",
        "Seconds since the last record, of the slowest process.",
        ANY_STEP,
        (
            Metric(
                "time/STAGE",
                "s",
                "Of a stage. The checkpoint's are of the step before, and only those that training waited for it; the "
                "evaluation before the first step counts to that one.",
                only_if="the stage ran",
                values=STAGES,
            ),
            Metric("time/step", "s", "Of all stages."),
        ),
    ),
    MetricGroup(
        "throughput",
        "How fast the batch was trained on.",
        ANY_STEP,
        (
            Metric(
                "throughput/tokens_per_s",
                "tokens/s",
                "Prompt and response tokens trained on, over the seconds of all stages but evaluation.",
            ),
            Metric(
                "throughput/mfu_STAGE",
                "share",
                "Model FLOPs of a stage over its seconds and the peak FLOP/s of all devices together.",
                only_if="the stage ran on a batch",
                values=TRAINED_STAGES,
            ),
            Metric(
                "throughput/mfu",
                "share",
                "The same of all these stages together.",
                only_if="one of them ran on a batch",
            ),
        ),
    ),
    MetricGroup(
        "memory",
        "The most that was held, of the fullest process: by the GPU's tensors; on a CPU by the process, with freed "
        "memory that glibc was told to keep.",
        ANY_STEP,
        (
            Metric("memory/STAGE_gib", "GiB", "In a stage.", only_if="the stage ran", values=STAGES),
            Metric("memory/peak_gib", "GiB", "In any stage."),
        ),
    ),
)
