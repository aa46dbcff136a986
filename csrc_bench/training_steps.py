"""The ways to make a training step, on random tokens and weights: ours, PEFT's, vmap's, and the floor.

K particles, B sequences, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from csrc_bench.measure import Shape, device_type
from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_kernels import renyi_reduce, use_backend

ALPHA = 0.8
LEARNING_RATE = 1e-4
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
    "tiny": lambda: llama(16, 24, 4, 2, 1, 64, tie_word_embeddings=True),
    "smollm2": lambda: llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "qwen2": lambda: llama(1536, 8960, 28, 12, 2, 151936, kind=Qwen2Config, tie_word_embeddings=True),
    "llama3": lambda: llama(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
}


def build_model(name: str, layers: int | None = None):
    """A bf16 model with random weights, the same at every call."""
    config = CONFIGS[name]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device(device_type()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)


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


def random_ids(shape: Shape, seed: int, num_tokens: int | None = None) -> Tensor:
    """[B, T] on the CPU, where a data loader would leave them."""
    size = (shape["B"], num_tokens or shape["T"])
    vocabulary = CONFIGS[shape["model"]]().vocab_size
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def sequence_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """[B] nats, summed over the tokens after the first, in plain PyTorch."""
    logits, targets = logits[:, :-1].float(), ids[:, 1:].to(logits.device)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nll.view(len(ids), -1).sum(-1)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """The optimizer, the same for every way: it is not what is compared."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


# Each way to make a step has step(ids), and score(ids) -> (logp [K, B], gradient [K, O, R]): for every particle the
# gradient of its own -sum_i logp[k, i] in the B of the lowest adapted q_proj.


class Ensemble:
    """Our step, with one path for all ops."""

    def __init__(self, model, shape: Shape, backend: str) -> None:
        self.backend, self.ensemble = backend, attach(model, shape)
        self.optimizer = adamw(self.ensemble.parameters())

    def step(self, ids: Tensor) -> None:
        with use_backend(self.backend):
            logp = self.ensemble.sequence_logprob({"input_ids": ids, "labels": ids})
            self.optimizer.zero_grad()
            renyi_reduce(logp, ALPHA).loss.mean().backward()
        self.optimizer.step()

    def score(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend(self.backend):
            logp = self.ensemble.sequence_logprob({"input_ids": ids, "labels": ids})
            _, B = next(iter(self.ensemble.stacked().values()))
            return logp.detach(), torch.autograd.grad(-logp.sum(), B)[0]

    def close(self) -> None:
        self.ensemble.detach()


class CompiledLayers(Ensemble):
    """Our step, with torch.compile of each decoder layer. Layers of the same kind share a graph."""

    def __init__(self, model, shape: Shape, backend: str) -> None:
        super().__init__(model, shape, backend)
        torch._dynamo.reset()
        self.layers = model.base_model.layers
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)

    def close(self) -> None:
        for layer in self.layers:
            del layer.forward
        super().close()


class Compiled(Ensemble):
    """torch.compile of the naive step's forward and backward."""

    def __init__(self, model, shape: Shape) -> None:
        super().__init__(model, shape, "reference")
        torch._dynamo.reset()
        self.model, self.backbone = model.base_model, model.base_model.forward
        self.model.forward = torch.compile(self.backbone, dynamic=False)

    def close(self) -> None:
        del self.model.forward
        super().close()


class Peft:
    """A loop over particles by PEFT's set_adapter, then one AdamW step for all.

    Its particles are not coupled (alpha = 0): coupling would cost PEFT one more scoring pass.
    """

    def __init__(self, model, shape: Shape, fp32: bool = True, everywhere: bool = False) -> None:
        from peft import LoraConfig, get_peft_model

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

    def nll(self, name: str, ids: Tensor) -> Tensor:
        self.model.set_adapter(name)
        ids = ids.to(device_type())
        return sequence_nll(self.model(input_ids=ids, use_cache=False).logits, ids)

    def step(self, ids: Tensor) -> None:
        self.optimizer.zero_grad()
        for name in self.names:
            self.nll(name, ids).mean().backward()
        self.optimizer.step()

    def score(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for name in self.names:
            nll = self.nll(name, ids)
            rows.append((-nll.detach(), torch.autograd.grad(nll.sum(), self.parameters[name][1])[0]))
        return torch.stack([logp for logp, _ in rows]), torch.stack([gradient for _, gradient in rows])

    def close(self) -> None:
        self.model.unload()


class Vmap:
    """torch.vmap of one PEFT adapter's forward over stacked adapters."""

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

    def logp(self, ids: Tensor) -> Tensor:
        ids = ids.to(device_type())

        def one(adapters):
            output = torch.func.functional_call(self.model, adapters, kwargs={"input_ids": ids, "use_cache": False})
            return -sequence_nll(output.logits, ids)

        # inside vmap no tensor says that it requires a gradient. So cuDNN's and the memory-efficient attention keep
        # nothing for their backward, and give a wrong gradient without an error.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return torch.vmap(one)(self.adapters)

    def step(self, ids: Tensor) -> None:
        logp = self.logp(ids)
        self.optimizer.zero_grad()
        renyi_reduce(logp, ALPHA, backend="reference").loss.mean().backward()
        self.optimizer.step()

    def score(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = self.logp(ids)
        return logp.detach(), torch.autograd.grad(-logp.sum(), list(self.adapters.values())[1])[0]

    def close(self) -> None:
        self.model.unload()


class FrozenBase:
    """The floor: the frozen base forward and backward on the same tokens, and the two products of its head.

    The layers below the first adapted one run forward only, once for all particles. The others run forward and backward
    on all rows.
    """

    def __init__(self, shape: Shape) -> None:
        self.K, adapted = shape["K"], shape["adapted_layers"]
        below = CONFIGS[shape["model"]]().num_hidden_layers - adapted
        self.top = build_model(shape["model"], adapted)
        self.trunk = build_model(shape["model"], below) if below else None

    def step(self, ids: Tensor) -> None:
        hidden = self.top.get_input_embeddings()(ids.to(device_type()))
        if self.trunk is not None:
            with torch.no_grad():
                hidden = self.trunk.base_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        rows = hidden.repeat(self.K, 1, 1).requires_grad_()
        out = self.top.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        weight = self.top.get_output_embeddings().weight
        with torch.no_grad():
            gradient = torch.empty_like(out)
            for part, into in zip(out.flatten(0, 1).split(2048), gradient.flatten(0, 1).split(2048), strict=True):
                torch.mm(part @ weight.mT, weight, out=into)
        torch.autograd.grad(out, rows, gradient)

    def close(self) -> None:
        pass


def initial(model, shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters from which our step starts, by path."""
    ensemble = attach(model, shape)
    stacked = {path: (A.detach().clone(), B.detach().clone()) for path, (A, B) in ensemble.stacked().items()}
    ensemble.detach()
    return stacked
