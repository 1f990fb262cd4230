"""Every key of a run: one frozen, validated section a stage. A stage is handed its own section and no other.

Keys left out of a config file have the defaults below, which are the published hyper-parameters of PRIME's 7B run
where the paper states one. Checks that need more than one section are at the end of the file.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Run(Section):
    """The run as a whole: its directory, length, seed, device and checkpoints."""

    dir: Path = Path("runs/prime")
    """Directory of everything the run leaves; the same command in the same directory resumes."""
    steps: Whole = 240
    """PRIME steps: one batch of rollouts each."""
    seed: Seed = 0
    """Of data order, sampling and mini-batches; the same seed gives the same run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is the GPU where there is one."""
    checkpoint_every: Whole = 10
    """Steps between checkpoints; 0 saves at the end, and on an interrupt, alone."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""
    keep_every: Whole = 0
    """Checkpoints of multiples of this step stay for good; 0 for none of them."""
    patience: Positive = 1800.0
    """The longest wait, in seconds, for another process, a server's start or its answer; then the run gives up. For
    answers it is half of that where several processes train. Responses to a prompt are asked for again after half of
    what an answer may take."""
    wandb: bool = False
    """Log to Weights & Biases too (extra `wandb`); metrics.jsonl and TensorBoard are always written."""


class Model(Section):
    """Policy, PRM and reference: what they start from, how they are held and computed."""

    policy: str = "PRIME-RL/Eurus-2-7B-SFT"
    """SFT model the policy starts from: a directory, a hub name, or `sft` for what this run's own SFT stage made."""
    prm: str | None = None
    """Model the implicit PRM starts from; the policy's where left out."""
    reference: str | None = None
    """Frozen reference of the implicit rewards and of the KL term; the policy's where left out."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the computation; weights being trained are kept in float32."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Implementation of attention; `auto` is flash_attention_2 on a GPU where it is installed, else sdpa."""
    blocks: tuple[Literal["checkpoint", "compile", "liger"], ...] = ()
    """What is done to transformer blocks: recomputed in backward instead of keeping their activations, compiled by
    torch.compile, their norms, MLPs and rotary embeddings replaced by Liger's (extra `liger`)."""
    lora: Whole = 0
    """Rank of low-rank adapters of policy and PRM, which then train alone (alpha = 2 × rank); 0 trains all weights."""
    tokens_per_micro_batch: Count = 16384
    """Prompt, response and padding tokens that one forward and backward takes; bounds memory, not results."""
    replicas: Count = 1
    """Full copies of the models (HSDP): each is sharded over processes / replicas, usually those of a node."""
    offload: tuple[Literal["policy", "prm", "reference"], ...] = ()
    """Models whose weights, gradients and optimizer stay in host memory and visit the GPU block by block."""


class Data(Section):
    """Prompts to train on and to evaluate with."""

    train: str = "PRIME-RL/Eurus-2-RL-Data:train"
    """Prompts: `arithmetic` (generated; `arithmetic:6` has six operations, not four), a .jsonl, .json or .parquet file,
    or a hub dataset as `name:split`."""
    eval: str = "PRIME-RL/Eurus-2-RL-Data:validation"
    """Held-out prompts, named as `train` is."""
    system: str = "actions"
    """System prompt: `actions` (PRIME's seven actions), `none` (the data's own, if any), or the text itself."""
    suffix: bool = True
    """Append PRIME's instruction on the answer's format to math and code prompts."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are dropped and counted."""


class SFT(Section):
    """Supervised fine-tuning before PRIME, where `model.policy` is `sft`."""

    base: str = "Qwen/Qwen2.5-Math-7B"
    """Model to start from: a directory, a hub name, or `tiny:96x3x4` for random weights of the Qwen2 architecture with
    so many dimensions, layers and heads and the characters of `arithmetic` for a vocabulary."""
    data: str = "PRIME-RL/Eurus-2-SFT-Data:train"
    """Demonstrations: `arithmetic`, a .jsonl, .json or .parquet file of chats, or a hub dataset as `name:split`."""
    steps: Whole = 0
    """Optimizer steps; 0 goes over the data `epochs` times."""
    epochs: Positive = 3.0
    """Passes over the data where `steps` is 0."""
    batch: Count = 96
    """Examples a step."""
    lr: Positive = 1e-5
    """Peak learning rate; reached after a tenth of the steps, then a cosine to 0."""


class Rollout(Section):
    """Sampling of responses to prompts."""

    engine: Literal["local", "vllm"] = "local"
    """`local`: sampled by this process from the policy's own weights; `vllm`: by vLLM servers over HTTP."""
    prompts: Count = 256
    """Prompts in a batch, after the filter."""
    samples: Count = 4
    """Responses to each prompt, K."""
    temperature: Positive = 1.0
    """Of sampling, and of the policy's log-probs in training."""
    max_tokens: Count = 3072
    """Response tokens, end of sequence included."""
    cache_gib: Positive = 8.0
    """local, and vLLM on a CPU: memory of the key-value cache, GiB; bounds how many responses are sampled at a time."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """vllm: 1 samples the next batch while the policy trains on this one, from weights a step older; 0 takes turns."""
    importance_clamp: NonNegative = 2.0
    """Bound on π_old/π_sampler, which weights each token of the policy's loss; 0 for no such weights."""


class VLLM(Section):
    """The servers of rollout.engine `vllm`."""

    servers: str = ""
    """URLs of running servers, separated by spaces; or what starts one: the Python of an environment that has vLLM, and
    then options of its server, if any."""
    transport: Literal["file", "nccl", "ipc"] = "file"
    """How new weights get into servers: `file`, everywhere; `nccl`, from GPU to GPU; `ipc`, within one GPU's memory."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Of running servers; none where one is to be started."""
        words = self.servers.split()
        return tuple(word.rstrip("/") for word in words) if "://" in "".join(words[:1]) else ()

    @property
    def local(self) -> bool:
        """Whether all servers are on this machine."""
        return all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in self.urls)

    @property
    def sleeps(self) -> bool:
        """Whether the server that is started shares the trainer's GPU, and gives it up while the policy trains."""
        return not self.urls and "--enable-sleep-mode" in self.servers.split()

    @model_validator(mode="after")
    def _urls_or_command(self) -> Self:
        odd = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if odd:
            raise ValueError(f"vllm.servers must be URLs alone, http:// or https://, or a command, found {odd[0]!r}")
        return self


class Filter(Section):
    """Which prompts are trained on, by the mean outcome of their responses."""

    low: Share = 0.2
    """A prompt is kept if its mean outcome is at least this."""
    high: Share = 0.8
    """A prompt is kept if its mean outcome is at most this."""
    max_prompts: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.0
    """Sampling goes on until the batch is full, at most over this many times `rollout.prompts` prompts."""
    drop_truncated: bool = False
    """Drop a prompt if one of its responses was cut off at `rollout.max_tokens`."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"filter.low must not exceed filter.high = {self.high}, got {self.low}")
        return self


class Verify(Section):
    """Outcomes of math and code answers."""

    workers: Count = 8
    """Verifier processes."""
    deadline: Positive = 30.0
    """Seconds one answer may take; then it is killed and scores 0."""
    custom: str | None = None
    """Verifier of your own as `module:function`, (prompt, response) -> score in [0, 1]."""
    extract: tuple[Literal["boxed", "hash", "answer_is"], ...] = ("boxed", "hash", "answer_is")
    """Where a math answer is looked for, \\boxed{}, #### and "the answer is"; the first form found counts."""
    unsafe: bool = False
    """Run code answers without a sandbox where none can be set up. The model's code then has your rights."""


class PRM(Section):
    """The implicit PRM: its rewards, and what it learns from outcomes."""

    update: Literal["after", "before", "none"] = "after"
    """When the PRM learns from a batch: `after` its rewards are taken, from the same forward; `before`, scoring the
    batch again; `none`, never."""
    loss: Literal["ce", "dpo"] = "ce"
    """Cross-entropy of outcomes, or a preference for each response over its group's opposite ones."""
    reference: Literal["frozen", "policy"] = "frozen"
    """What rewards are relative to: the reference model, or the policy as it was when the batch was sampled."""
    beta: Positive = 0.05
    """Scale β of the rewards, r_t = β·(log π_prm − log π_ref)."""
    granularity: Literal["token", "step", "whole"] = "token"
    """Where rewards stand: on each token, summed on each step's last token, or on the response's last token."""
    step_pattern: str = r"\n\s*\n"
    """Regular expression that ends a step, for granularity `step`."""
    max_log_ratio: Positive | None = None
    """Bound on |log π_prm − log π_ref| of a token in its reward (not in the loss); none where left out."""
    lr: Positive = 1e-6
    """Learning rate of AdamW, constant."""
    grad_clip: Positive = 10.0
    """Bound on the gradient's norm."""
    mini_batch: Count = 256
    """Responses an optimizer step."""

    @model_validator(mode="after")
    def _pattern_compiles(self) -> Self:
        try:
            re.compile(self.step_pattern)
        except re.error as error:
            raise ValueError(f"prm.step_pattern must be a regular expression: {error}") from None
        return self


class Advantage(Section):
    """Advantages of tokens, from process rewards and outcomes."""

    estimator: Literal["rloo", "rloo_released", "grpo", "reinforce"] = "rloo"
    """Baseline: leave-one-out as in Eq. 5 of the paper, or as the released code computes it on process rewards; group
    mean and deviation; none."""
    process_coef: NonNegative = 5.0
    """Weight of the process rewards; 0 trains on outcomes alone, without a PRM."""
    outcome_coef: NonNegative = 5.0
    """Weight of the outcomes."""
    process_gamma: Share = 1.0
    """Discount of the process rewards' return."""
    outcome_gamma: Share = 1.0
    """Discount of the outcome's return."""
    process_norm: bool = True
    """Divide process rewards by the largest |return| of the batch."""
    whiten: bool = True
    """Mean 0 and variance 1 over the response tokens of the batch."""


class Policy(Section):
    """The policy's update: PPO."""

    lr: Positive = 5e-7
    """Learning rate of AdamW, constant."""
    weight_decay: NonNegative = 0.01
    """Of AdamW."""
    grad_clip: Positive = 1.0
    """Bound on the gradient's norm."""
    mini_batch: Count = 256
    """Responses an optimizer step."""
    epochs: Count = 1
    """Passes over a batch."""
    clip_low: Share = 0.2
    """The probability ratio is clipped below at 1 − this."""
    clip_high: NonNegative = 0.2
    """The probability ratio is clipped above at 1 + this."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound c on −A·ratio/|A| where the advantage is negative; none where left out."""
    entropy_coef: Finite = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegative = 0.0
    """Weight of the k3 estimate of the KL divergence to the reference."""
    aggregate: Literal["token", "sequence", "fixed"] = "token"
    """Losses are averaged over all tokens, over tokens then responses, or divided by responses × `max_tokens`."""


class Evaluation(Section):
    """Accuracy on held-out prompts during training."""

    every: Whole = 16
    """Steps between evaluations; 0 for none but those before the first and after the last step."""
    prompts: Count = 1024
    """The first so many held-out prompts."""
    samples: Whole = 0
    """Responses a prompt sampled at `rollout.temperature`, beside the greedy one; 0 for none."""


class Config(Section):
    """A whole run."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    sft: SFT = SFT()
    rollout: Rollout = Rollout()
    vllm: VLLM = VLLM()
    filter: Filter = Filter()
    verify: Verify = Verify()
    prm: PRM = PRM()
    advantage: Advantage = Advantage()
    policy: Policy = Policy()
    eval: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.rollout.engine == "vllm" and not self.vllm.servers.strip():
            raise ValueError("vllm.servers must be given for rollout.engine 'vllm': URLs, or a Python that has vLLM")
        if self.rollout.ahead and self.rollout.engine == "local":
            raise ValueError(
                "rollout.ahead must be 0 for rollout.engine 'local', which has but one copy of the weights"
            )
        if self.rollout.ahead and self.vllm.sleeps:
            raise ValueError("rollout.ahead must be 0 where vllm.servers has the server sleep while the policy trains")
        K, responses = self.rollout.samples, self.rollout.prompts * self.rollout.samples
        if self.advantage.estimator != "reinforce" and K < 2:
            raise ValueError(f"rollout.samples must be at least 2 for advantage.estimator {self.advantage.estimator!r}")
        learners = {"policy": self.policy.mini_batch}
        if self.advantage.process_coef > 0 and self.prm.update != "none":
            learners["prm"] = self.prm.mini_batch
        for name, size in learners.items():
            if size > responses:
                raise ValueError(
                    f"{name}.mini_batch must not exceed rollout.prompts × rollout.samples = {responses}, got {size}"
                )
        if "prm" in learners and self.prm.loss == "dpo" and self.prm.mini_batch % K:
            raise ValueError(f"prm.mini_batch must be a multiple of rollout.samples = {K} for prm.loss 'dpo'")
        if self.advantage.process_coef == self.advantage.outcome_coef == 0:
            raise ValueError(
                "advantage.process_coef and advantage.outcome_coef must not both be 0: nothing would train"
            )
        return self
