"""The model's shape (a JSON file) and a run's settings (the command line), as frozen dataclasses."""

import dataclasses
import json
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptbert.errors import InputError
from gptbert.io.field_types import settle
from gptbert.io.files import check_folder_name
from gptbert.io.json_file import read_json

_LARGEST_SIZE = 10_000_000
_LARGEST = {"num_hidden_layers": 1000, "max_position_embeddings": 2**20}  # costly even without weights
_MODEL_JSON_BYTES = 1 << 16
_SHAPES = Path(__file__).parent / "configs"


def shape_file(path: Path) -> Path:
    """The JSON file of a model's shape: `path`, or the file of that name in gptbert/configs."""
    return path if path.is_file() or str(path) not in _named_shapes() else _SHAPES / f"{path}.json"


def _named_shapes() -> list[str]:
    return sorted(file.stem for file in _SHAPES.glob("*.json"))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a GPT-BERT; the fields are the keys of the published JSON files."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    position_bucket_size: int
    attention_probs_dropout_prob: float
    hidden_dropout_prob: float
    layer_norm_eps: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                found = reprlib.repr(value)
                raise InputError(f"{field.name} is {found}, expected a number of type {kinds[-1].__name__}")
            largest = _LARGEST.get(field.name, _LARGEST_SIZE)
            if field.type is int and not 1 <= value <= largest:
                raise InputError(f"{field.name} is {reprlib.repr(value)}, expected a number from 1 to {largest}")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.position_bucket_size < 4 or self.position_bucket_size % 2:
            raise InputError(f"position_bucket_size is {self.position_bucket_size}, expected an even number from 4")
        if self.max_position_embeddings <= self.position_bucket_size:
            raise InputError(
                f"max_position_embeddings {self.max_position_embeddings} must be above "
                f"position_bucket_size {self.position_bucket_size}"
            )
        for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                found = reprlib.repr(getattr(self, name))
                raise InputError(f"{name} is {found}, expected a probability below 1")
        if not 0 < self.layer_norm_eps <= 1:
            found = reprlib.repr(self.layer_norm_eps)
            raise InputError(f"layer_norm_eps is {found}, expected a positive number, at most 1")

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the tied embedding counted once."""
        hidden, layers = self.hidden_size, self.num_hidden_layers
        positions = 2 * self.position_bucket_size - 1
        embedding = (self.vocab_size + positions + 2) * hidden
        attention = 5 * hidden * hidden + 5 * hidden
        feed_forward = 3 * self.intermediate_size * hidden
        mixes = layers * (2 * layers + 3)
        return embedding + layers * (attention + feed_forward) + mixes + hidden * hidden + hidden + self.vocab_size

    @classmethod
    def from_json(cls, path: str | Path, vocab_size: int | None = None) -> "ModelConfig":
        """Read a published or own JSON file.

        Args:
            path: the file, or the name of one in gptbert/configs, such as small.
            vocab_size: a tokenizer's, which the model's is at least, whatever the file says; the file may lack it then.

        Raises:
            InputError: the file cannot be read, a key is unknown or missing, or a value is invalid.
        """
        path = shape_file(Path(path))
        try:
            values = read_json(path, _MODEL_JSON_BYTES, unique_keys=True)
        except FileNotFoundError as error:
            raise InputError(f"model config {path}: no such file, nor one of {', '.join(_named_shapes())}") from error
        except ValueError as error:
            raise InputError(f"model config {path}: cannot be read as JSON ({error})") from error
        if not isinstance(values, dict):
            raise InputError(f"model config {path}: expected a JSON object")
        config = cls.from_values({"vocab_size": vocab_size} | values if vocab_size else values, path)
        if vocab_size is None or vocab_size <= config.vocab_size:
            return config
        return cls.from_values(values | {"vocab_size": vocab_size}, path)

    @classmethod
    def from_values(cls, values: dict[str, Any], path: Path) -> "ModelConfig":
        """Convert a JSON file's values to a shape that fits this machine's memory.

        Raises:
            InputError: a key is unknown or missing, or a value is invalid; names the file.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise InputError(f"model config {path}: unknown key {', '.join(unknown)} (known: {', '.join(known)})")
        if missing := [name for name in known if name not in values]:
            raise InputError(f"model config {path}: missing key {', '.join(missing)}")
        try:
            config = cls(**values)
        except InputError as error:
            raise InputError(f"model config {path}: {error}") from None
        needed, memory = 4 * config.num_parameters, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > memory:
            sizes = f"{needed / 1e9:,.0f} GB, more than this machine's {memory / 1e9:,.0f} GB"
            raise InputError(f"model config {path}: its {config.num_parameters:.3g} parameters take {sizes}")
        return config


@dataclass(frozen=True)
class TrainConfig:
    """Train a hybrid GPT-BERT: masked and causal language modeling in one transformer.

    Runs as one process, or as many as torchrun starts, on GPUs (nccl) or CPUs (gloo).
    """

    train_path: tuple[Path, ...]
    """Token file to train on (from tokenize_corpus.py, or upstream's .bin). Several: one per corpus, mixed according to
    --train_weights."""
    valid_path: Path
    """Token file to validate on."""
    config_file: Path
    """JSON file with the model's shape; or tiny, small, base, base_32k or 1b, whose files are in gptbert/configs.
    If its vocab_size is less than the tokenizer's, or missing, the model takes the tokenizer's."""
    tokenizer_path: Path
    """Tokenizer JSON file that the token files were written with."""
    output_dir: Path = Path("checkpoints")
    """Folder of all runs; this run writes to output_dir/name."""
    name: str = "gptbert"
    """Name of the run: its folder's name, and its name in wandb."""
    run_file: Path | None = None
    """YAML or TOML file with flags of this command; those on the command line count more. A run's folder has one with
    all of its flags, run.yaml."""

    train_weights: tuple[float, ...] = ()
    """Relative weight of each corpus in the training tokens, in the order of --train_path: a corpus with more than its
    size repeats more often. Default: the corpora's sizes, so that their epochs end together."""

    hybrid_numerator: int = 1
    """Fraction of training on the masked objective, numerator: the fraction is hybrid_numerator/hybrid_denominator."""
    hybrid_denominator: int = 4
    """Fraction of training on the masked objective, denominator."""
    hybrid_mode: Literal["auto", "rank", "batch"] = "auto"
    """rank: each process trains one objective (the number of processes must be a multiple of the denominator).
    batch: each process trains both. auto: rank if the number of processes allows it, else batch."""
    token_weighted_loss: bool = False
    """One mean over all labels of both objectives, instead of numerator/denominator times each objective's mean."""

    seq_length: int = 128
    """Tokens per row."""
    seq_length_growth: bool = False
    """Double the row length at 70 % and again at 90 % of the run, with the rows per step divided by the same factor."""
    local_batch_size: int = 32
    """Maximum rows per process in one micro-batch; larger batches use gradient accumulation. On a CPU, micro-batches
    have at most 1,024 tokens per thread (or 2,048 if that is more): as fast, in less memory."""
    global_batch_size: int = 128
    """Rows per step at the end of the run, over all processes and both objectives."""
    batch_reduction: float = 4.0
    """The first step has global_batch_size/batch_reduction rows; the number grows linearly. 1: no growth."""

    optimizer: Literal["lamb", "adamw", "muon"] = "lamb"
    """lamb scales each tensor's update to the tensor's norm, adamw does not. muon: Muon for the matrices of blocks and
    head, at AdamW's learning rates, and AdamW for the rest; requires --parallel ddp."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of everything but biases and LayerNorm parameters."""
    optimizer_beta1: float = 0.9
    """Decay of the first moment."""
    optimizer_beta2: float = 0.98
    """Decay of the second moment."""
    optimizer_eps: float = 1e-8
    """Added to the square root of the second moment."""
    max_gradient: float = 2.0
    """Gradients are clipped to this global norm; 1e9 clips none."""
    max_skipped_steps: int = 10
    """End the run after this many consecutive steps skipped for non-finite gradients; checked at each log record."""
    ema_decay: float = 0.999
    """Decay per step of the moving average of the weights."""
    z_loss_weight: float = 1e-4
    """Weight of the mean of logsumexp² in the loss."""

    max_steps: int = 40_000
    """Optimizer steps of the whole run."""
    warmup_proportion: float = 0.016
    """Fraction of the steps over which the learning rate rises from 0."""
    cooldown_proportion: float = 0.016
    """Fraction of the steps, at the end, over which the learning rate falls to 0: from a tenth, or with --schedule
    trapezoid from the peak."""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    """Between warmup and cooldown the learning rate falls to a tenth (cosine), or stays at its peak (trapezoid).
    constant: it stays there to the end, without a cooldown; --branch_from gives such a run any number of endings."""

    mask_p_start: float = 0.3
    """Fraction of tokens masked at the first step; it changes linearly to mask_p_end."""
    mask_p_end: float = 0.15
    """Fraction of tokens masked at max_steps."""
    mask_random_p: float = 0.1
    """Fraction of masked tokens replaced by a random one."""
    mask_keep_p: float = 0.1
    """Fraction of masked tokens left unchanged."""
    mask_history: bool = False
    """Prefer tokens that were masked less often in earlier epochs (one byte per training token and process)."""
    n_special_tokens: int | None = None
    """Number of special tokens, which are never masked and never drawn as a random token. The tokenizer says which they
    are; this is a check, which ends the run if the number is another one. Default: no check."""

    mixed_precision: bool = False
    """Compute in bf16 (autocast); weights, gradients and optimizer state stay fp32. A device without instructions for
    products of bf16 computes in fp32, which is several times as fast there; a line says so."""
    compile: bool = True
    """Compile the model's blocks with torch.compile if that saves the whole run more time than it costs: half a minute
    at the first start, seconds at later ones. A resumed run keeps its choice."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has all weights. fsdp: weights, their average and optimizer state are sharded over processes,
    and a block's weights are gathered when needed; the results are the same."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of gradients on their way between processes. bf16: half the bytes, sums of about three digits."""
    shard_size: int = 0
    """With fsdp, the number of processes that one copy of the weights is sharded over, such as those of one host; the
    number of all processes must be a multiple of it. 0: all of them."""
    activation_checkpointing: bool = False
    """Keep only the inputs of attention and feed-forward for the backward, and recompute the rest there: a third of the
    activation memory, for steps a third longer; the results are the same."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: a GPU if there is one. mps: Apple's, for one process, on which no run has been made yet."""
    kernels: Literal["auto", "torch", "triton", "cpp"] = "auto"
    """Implementation of the operations in kernels/. auto: triton on a GPU; on a CPU cpp in compiled runs, else torch.
    cpp needs a C++ compiler; it has kernels for LAMB and, with --mixed_precision, for all else but masking."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record a step's kernels in CUDA graphs, which launches them at once: steps of the same bits, several times as
    fast where batches are small. auto: on GPUs, except with fsdp. on: on a CPU too, where the same operations run
    without a recording, to try out what a GPU will do. off: operation by operation, with DDP."""
    kernel_check: Literal["on", "off"] = "on"
    """on: before the first step, compare the kernels with their references on this device (seconds)."""
    cpu_threads: int = 0
    """Threads per process on a CPU, overriding OMP_NUM_THREADS; 0 divides this machine's cores among its processes."""
    huge_pages: bool = True
    """On a CPU: keep freed memory in the process and ask for huge pages, which takes up to a fifth more memory and
    saves some 5 % of a step. --no_huge_pages leaves the allocator as it is."""
    timeout: int = 600
    """Seconds after which a hanging collective operation ends the run. Work of the main process alone, such as a save,
    may take longer."""
    seed: int = 42
    """Seed of initialization, shuffling, masking and dropout."""

    validate_every: int = 1000
    """Steps between validations; 0: only at the end."""
    validation_steps: int | None = None
    """Validate on this many batches of global_batch_size rows per objective, spread evenly over the file; 0: on the
    whole file. Default: on 262,144 tokens, or the whole file if it has fewer."""
    validation_mask_p: float = 0.15
    """Fraction of tokens masked in validation; the masks are the same every time."""
    pairs_path: tuple[Path, ...] = ()
    """JSONL files of minimal pairs, or folders of them, to score during the run, as gptbert score does."""
    score_every: int = 1000
    """Steps between scores of --pairs_path; 0: only at the end."""
    log_every: int = 10
    """Steps between log records; in between, nothing is read back from the device."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    save_steps: tuple[int, ...] = ()
    """Also save checkpoints after these numbers of steps, and keep them."""
    keep_checkpoints: int = 3
    """Number of checkpoints to keep, the newest ones, besides those of --save_steps and --keep_best."""
    keep_best: str | None = None
    """Record, such as validation_ema/mlm/loss or pairs/clm/accuracy, of which the checkpoint with the best value is
    kept too; the run's best.json names it. A checkpoint is then saved before each of these validations or scores."""
    checkpoint_words: tuple[str, ...] = ()
    """Also save weights after these numbers of words seen, permanently, in the run's words/chck_1M and so on: such as
    500_000 1M 1.5B, or babylm for 1M, 2M, … 10M, 20M, … 100M, 200M, … 1000M, as far as the run goes."""
    initial_weights: Path | None = None
    """Start from these weights instead of random ones, with a fresh optimizer and schedules: a checkpoint's folder, a
    run's folder for its newest checkpoint, or one from gptbert.import_hf."""
    resume: str | None = None
    """auto: resume from the run's newest checkpoint, or start from scratch if there is none.
    A path: resume from that checkpoint."""
    branch_from: Path | None = None
    """Go on from this checkpoint of another run, or from that run's newest one, to an end of its own at --max_steps:
    the learning rate falls linearly from what it is there to 0."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ("wandb",)
    """Where records go besides metrics.jsonl: any of these, or nothing after the flag for none."""
    wandb_project: str = "gptbert"
    """Project in wandb."""
    wandb_entity: str | None = None
    """Team or user in wandb."""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if the user is logged in to wandb, else offline."""

    def __post_init__(self) -> None:
        settle(self)
        at_least = {
            "seq_length": 2, "local_batch_size": 1, "global_batch_size": 1, "batch_reduction": 1, "hybrid_numerator": 0,
            "hybrid_denominator": 1, "max_steps": 1, "learning_rate": 0, "weight_decay": 0, "optimizer_beta1": 0,
            "optimizer_beta2": 0, "optimizer_eps": 0, "max_gradient": 0, "max_skipped_steps": 1, "ema_decay": 0,
            "z_loss_weight": 0, "n_special_tokens": 5, "cpu_threads": 0, "timeout": 1, "seed": 0, "validate_every": 0,
            "validation_steps": 0, "score_every": 0, "shard_size": 0, "log_every": 1, "save_every": 0,
            "keep_checkpoints": 1,
        }  # fmt: skip
        for name, lowest in at_least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= lowest:
                raise InputError(f"--{name} is {getattr(self, name)}, expected at least {lowest}")
        for name in (
            "warmup_proportion", "cooldown_proportion", "mask_p_start", "mask_p_end", "mask_random_p", "mask_keep_p",
            "validation_mask_p", "ema_decay",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} is {getattr(self, name)}, expected a number from 0 to 1")
        below = {
            "optimizer_beta1": 1, "optimizer_beta2": 1, "learning_rate": math.inf, "weight_decay": math.inf,
            "optimizer_eps": math.inf, "max_gradient": math.inf, "z_loss_weight": math.inf, "batch_reduction": math.inf,
            "seed": 2**32, "timeout": 10**7, "global_batch_size": 10**7, "local_batch_size": 10**7,
            "max_steps": 10**8, "seq_length": _LARGEST_SIZE,
        }  # fmt: skip
        for name, limit in below.items():
            if not getattr(self, name) < limit:
                raise InputError(f"--{name} is {getattr(self, name)}, expected a number below {limit}")
        if wrong := [step for step in self.save_steps if not 1 <= step <= self.max_steps]:
            raise InputError(f"--save_steps has {wrong[0]}, expected steps from 1 to --max_steps {self.max_steps}")
        self._check_corpora()
        self._check_combinations()

    def _check_corpora(self) -> None:
        paths, weights = self.train_path, self.train_weights
        if not paths:
            raise InputError("--train_path names no file; name one or more token files")
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise InputError(f"--train_path names {twice} twice; name it once, with a larger share in --train_weights")
        if weights and len(weights) != len(paths):
            counts = f"{len(weights)} for {len(paths)} of --train_path"
            raise InputError(f"--train_weights: expected a number for each token file, found {counts}")
        if wrong := [weight for weight in weights if not 0 < weight < math.inf]:
            raise InputError(f"--train_weights has {wrong[0]}, expected positive numbers; leave out files of no weight")

    def _check_combinations(self) -> None:
        if self.hybrid_numerator > self.hybrid_denominator:
            raise InputError(
                f"--hybrid_numerator {self.hybrid_numerator} is above --hybrid_denominator {self.hybrid_denominator}: "
                "the masked share of the training is at most 1/1"
            )
        if self.warmup_proportion + self.cooldown_proportion > 1:
            raise InputError("--warmup_proportion and --cooldown_proportion together are above 1")
        if self.mask_random_p + self.mask_keep_p > 1:
            raise InputError("--mask_random_p and --mask_keep_p together are above 1")
        if self.shard_size and self.parallel != "fsdp":
            raise InputError(f"--shard_size {self.shard_size} is for --parallel fsdp, not {self.parallel}")
        if self.cuda_graph == "on" and self.parallel == "fsdp":
            raise InputError("--cuda_graph on: steps with --parallel fsdp cannot be recorded; use auto or off, or ddp")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise InputError("--optimizer muon needs whole matrices, which no rank has with --parallel fsdp; use ddp")
        if self.max_gradient == 0:
            raise InputError("--max_gradient is 0, which would clip every gradient away; 1e9 clips none")
        check_folder_name("--name", self.name, "--output_dir")

    def is_sharded(self, world_size: int) -> bool:
        """Whether the weights are sharded over this many ranks; see `parallel`."""
        return self.parallel == "fsdp" and world_size > 1

    def records_steps(self, device_type: str) -> bool:
        """Whether steps on a device of this type, "cuda" or "cpu", are recorded in CUDA graphs; see `cuda_graph`."""
        if self.cuda_graph == "auto":
            return device_type == "cuda" and self.parallel != "fsdp"
        return self.cuda_graph == "on"

    @property
    def run_dir(self) -> Path:
        """This run's folder."""
        return self.output_dir / self.name

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning rate's warmup."""
        return round(self.max_steps * self.warmup_proportion)

    @property
    def cooldown_steps(self) -> int:
        """Steps of the learning rate's final cooldown."""
        return round(self.max_steps * self.cooldown_proportion)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values: paths as strings, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))
