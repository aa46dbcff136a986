"""The ways to make a training step, on random tokens and weights: ours, PEFT's and vmap's.

K particles, B sequences, T tokens, N tokens of all sequences, R rank, I/O in/out features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from csrc_bench.batches import Batch, Family, padding_free, stacked
from csrc_bench.measure import Shape, device_type
from renyi_engine import EnsembleConfig, LoraEnsemble, SftConfig
from renyi_engine.data import RowSizes, choose_sizes, fill, pack
from renyi_engine.objectives import Scores
from renyi_engine.training.train_step import StepResult, micro_step, train_step
from renyi_kernels import IGNORE_INDEX, renyi_reduce, use_backend

ALPHA = 0.8
BETA = 0.1  # of pairs
LEARNING_RATE = 1e-4
NUM_TRAIN_EXAMPLES = 1000  # by which the prior is divided
SETTINGS = SftConfig(model_name_or_path="random", dataset_name="random", output_dir="nowhere")
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear ones but the head


def llama(hidden, inner, layers, heads, kv_heads, vocabulary, kind=LlamaConfig, **options):
    return kind(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


CONFIGS = {
    "tiny": lambda: llama(16, 24, 2, 2, 1, 64, tie_word_embeddings=True),
    "smollm2": lambda: llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "qwen2": lambda: llama(1536, 8960, 28, 12, 2, 151936, kind=Qwen2Config, tie_word_embeddings=True),
    "llama3": lambda: llama(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
}


def build_model(name: str):
    """A bf16 model with random weights, the same at every call."""
    torch.manual_seed(0)
    with torch.device(device_type()):
        return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16).requires_grad_(False)


def compiler_of(shape: Shape) -> str:
    """The backend of torch.compile. For a tiny shape it is one that shows what can be compiled, and takes less time."""
    return "eager" if shape["model"] == "tiny" else "inductor"


def layers_of(shape: Shape) -> list[int] | None:
    layers = CONFIGS[shape["model"]]().num_hidden_layers
    return None if shape["adapted_layers"] == layers else list(range(layers - shape["adapted_layers"], layers))


def attach(model, shape: Shape) -> LoraEnsemble:
    """An ensemble whose B is not zero, so that particles differ and no gradient is zero."""
    return LoraEnsemble.attach(
        model,
        EnsembleConfig(
            num_particles=shape["K"],
            rank=shape["R"],
            lora_alpha=2 * shape["R"],
            target_modules=MAPS,
            layers_to_transform=layers_of(shape),
            init="spread",
        ),
    ).train()


def vocabulary_of(shape: Shape) -> int:
    return CONFIGS[shape["model"]]().vocab_size


def objective(logp: Tensor, shape: Shape) -> Tensor:
    """The log-likelihoods [..., examples] that are learnt, of those of sequences [..., B]. Of a pair it is (24), of
    which the base's part is a constant."""
    return F.logsigmoid(BETA * (logp[..., 0::2] - logp[..., 1::2])) if shape.get("pairs") else logp


def predicting(labels: Tensor) -> Tensor:
    """The places in the flattened labels [B, T] whose tokens predict a label: the places before those with one."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] nats, summed over the labels after the first place, in plain PyTorch."""
    logits, targets = logits[:, :-1].float(), labels[:, 1:].to(logits.device)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view(len(labels), -1).sum(-1)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """The optimizer, the same for every way: it is not what is compared."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


Read = Callable[[list[Family]], Batch]


class Way:
    """A way to make a step.

    It has step(batch), and score(batch) -> (logp [K, B], gradient [K, O, R]): for every particle the gradient of its
    own -sum_i logp[k, i] in the B of the lowest adapted q_proj. Floors have no score.
    """

    read: Read

    def batches(self, of_families: list[list[Family]]) -> list:
        """What `step` is given, of all batches that take turns."""
        return [self.read(families) for families in of_families]

    def close(self) -> None:
        """Give the model back as it was."""


class Objective:
    """All that a step needs of a task."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def score(self, ensemble: LoraEnsemble, batch: Batch) -> Scores:
        return Scores(objective(ensemble.sequence_logprob(batch), self.shape))


class Ensemble(Way):
    """Our step, the one of `train`, with one path for all ops. By default nothing is captured or compiled."""

    def __init__(
        self, model, shape: Shape, backend: str, read: Read = pack, *, captured: bool = False, compiled: bool = False
    ) -> None:
        self.shape, self.backend, self.read, self.captured = shape, backend, read, captured
        self.ensemble, self.objective = attach(model, shape), Objective(shape)
        if compiled:
            self.ensemble.compile_layers(backend=compiler_of(shape))
        self.optimizer = adamw([self.ensemble.particles.values])
        self.run = self.ensemble.captured(partial(micro_step, self.ensemble, self.objective)) if captured else None
        number = partial(torch.full, (), device=device_type())
        self.alpha = number(fill_value=ALPHA, dtype=torch.float64)
        self.num_examples = number(fill_value=float(shape["B"]), dtype=torch.float32)

    def batches(self, of_families: list[list[Family]]) -> list[Batch]:
        """On the CPU, where a data loader would leave them: on a GPU in pinned memory. If the step is captured, rows
        are filled up, so that all have the same sizes."""
        batches = super().batches(of_families)
        if self.captured:
            (sizes,) = choose_sizes(map(RowSizes.of, batches), most=1)
            batches = [fill(batch, sizes) for batch in batches]
        if device_type() == "cuda":
            batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return batches

    def step(self, batch: Batch) -> StepResult:
        with use_backend(self.backend), as_asked():
            return train_step(
                self.ensemble,
                self.objective,
                self.optimizer,
                [batch],
                self.alpha,
                SETTINGS,
                num_train_examples=NUM_TRAIN_EXAMPLES,
                num_examples=self.num_examples,
                run=self.run,
            )

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        _, B = next(iter(self.ensemble.stacked().values()))

        def negative(inputs: Batch) -> dict[str, Tensor]:
            logp = self.ensemble.sequence_logprob(inputs)
            return {"loss": -logp.sum(), "logp": logp}

        with use_backend(self.backend), as_asked():
            if not self.captured:
                outputs = negative(batch)
                return outputs["logp"].detach(), torch.autograd.grad(outputs["loss"], B)[0]
            run = self.ensemble.captured(negative)
            for _ in range(2):  # the second time it is a replay
                self.ensemble.particles.zero_gradients()
                outputs = run(batch)
            return outputs["logp"], B.grad.clone()

    def close(self) -> None:
        self.ensemble.detach()


@contextmanager
def as_asked() -> Iterator[None]:
    """Inside the block, it is an error if a step is not captured, or its layers not compiled, although this was asked
    for: its row would be another way's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not recorded as CUDA graphs|run uncompiled)")
        yield


class Compiled(Ensemble):
    """torch.compile of the naive step's forward and backward."""

    def __init__(self, model, shape: Shape) -> None:
        super().__init__(model, shape, "reference", stacked)
        torch._dynamo.reset()
        self.model, self.backbone = model.base_model, model.base_model.forward
        self.model.forward = torch.compile(self.backbone, dynamic=False)

    def close(self) -> None:
        del self.model.forward
        super().close()


class Peft(Way):
    """A loop over particles by PEFT's set_adapter, then one AdamW step for all.

    Its particles are not coupled (alpha = 0): coupling would cost PEFT one more scoring pass.
    """

    def __init__(
        self, model, shape: Shape, read: Read = stacked, *, fp32: bool = True, everywhere: bool = False
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.shape, self.read = shape, read
        K, R = shape["K"], shape["R"]
        if everywhere:
            shape = shape | {"adapted_layers": model.config.num_hidden_layers}
        stacked = initial(model, shape)
        config = LoraConfig(
            r=R,
            lora_alpha=2 * R,
            target_modules=MAPS,
            layers_to_transform=layers_of(shape),
            task_type="CAUSAL_LM",
        )
        self.names = [f"p{k}" for k in range(K)]
        self.model = get_peft_model(model, config, adapter_name="p0", autocast_adapter_dtype=fp32)
        for name in self.names[1:]:
            self.model.add_adapter(name, config, autocast_adapter_dtype=fp32)
        self.parameters = {name: [] for name in self.names}
        with torch.no_grad():
            for path, (A, B) in stacked.items():
                lora = self.model.base_model.model.get_submodule(path)
                for k, name in enumerate(self.names):
                    pair = lora.lora_A[name].weight, lora.lora_B[name].weight
                    pair[0].copy_(A[k])
                    pair[1].copy_(B[k])
                    self.parameters[name] += pair
        self.optimizer = adamw([p for ps in self.parameters.values() for p in ps])

    def nll(self, batch: Batch) -> Tensor:
        """[B] nats, of the particle that is set."""
        inputs = {name: value.to(device_type()) for name, value in batch.items() if name != "labels"}
        return sequence_nll(self.model(**inputs, use_cache=False).logits, batch["labels"])

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        for name in self.names:
            self.model.set_adapter(name)
            (-objective(-self.nll(batch), self.shape)).mean().backward()
        self.optimizer.step()

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = []
        for name in self.names:
            self.model.set_adapter(name)
            nll = self.nll(batch)
            rows.append((-nll.detach(), torch.autograd.grad(nll.sum(), self.parameters[name][1])[0]))
        return torch.stack([logp for logp, _ in rows]), torch.stack([gradient for _, gradient in rows])

    def close(self) -> None:
        self.model.unload()


class PeftPaddingFree(Peft):
    """PEFT's loop without padding, as TRL's padding_free: transformers sees in position_ids where sequences begin, and
    masks its attention accordingly. Logits are made where a label needs them, which TRL does not do."""

    def __init__(self, model, shape: Shape) -> None:
        super().__init__(model, shape, padding_free)

    def nll(self, batch: Batch) -> Tensor:
        rows = predicting(batch["labels"])
        sequence = (batch["position_ids"][0] == 0).cumsum(0) - 1
        rows, labels, of = (x.to(device_type()) for x in (rows, batch["labels"][0, rows + 1], sequence[rows]))
        ids, positions = (batch[name].to(device_type()) for name in ("input_ids", "position_ids"))
        logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows).logits[0]
        nll = F.cross_entropy(logits.float(), labels, reduction="none")
        return nll.new_zeros(int(sequence[-1]) + 1).index_add(0, of, nll)


class Vmap(Way):
    """torch.vmap of one PEFT adapter's forward over stacked adapters."""

    read = staticmethod(stacked)

    def __init__(self, model, shape: Shape) -> None:
        from peft import LoraConfig, get_peft_model

        stacked, R = initial(model, shape), shape["R"]
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=MAPS, layers_to_transform=layers_of(shape))
        self.model = get_peft_model(model, config)
        self.adapters = {}
        for path, pair in stacked.items():
            for letter, tensor in zip("AB", pair, strict=True):
                self.adapters[f"base_model.model.{path}.lora_{letter}.default.weight"] = tensor.requires_grad_()
        self.optimizer = adamw(self.adapters.values())

    def logp(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch["input_ids"].to(device_type()), "use_cache": False}

        def one(adapters):
            logits = torch.func.functional_call(self.model, adapters, kwargs=inputs).logits
            return -sequence_nll(logits, batch["labels"])

        # inside vmap no tensor says that it requires a gradient. So cuDNN's and the memory-efficient attention keep
        # nothing for their backward, and give a wrong gradient without an error.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return torch.vmap(one)(self.adapters)

    def step(self, batch: Batch) -> None:
        logp = self.logp(batch)
        self.optimizer.zero_grad()
        renyi_reduce(logp, ALPHA, backend="reference").loss.mean().backward()
        self.optimizer.step()

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logp = self.logp(batch)
        return logp.detach(), torch.autograd.grad(-logp.sum(), list(self.adapters.values())[1])[0]

    def close(self) -> None:
        self.model.unload()


def initial(model, shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters from which our step starts, by path."""
    ensemble = attach(model, shape)
    stacked = {path: (A.detach().clone(), B.detach().clone()) for path, (A, B) in ensemble.stacked().items()}
    ensemble.detach()
    return stacked
