"""The head is measured on the model itself, exactly, in every precision."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.head import Head
from renyi_engine.ensemble.targets import decoder

from .. import tiny_models

IDS = torch.tensor([[5, 6, 7, 8]])
UNUSUAL = [
    "falcon_h1",
    "hyperclovax",
    "minicpm3",
    "inkling_text",
    "recurrent_gemma",
    "muse_glimmer",
    "granite",
]


def head_of(model):
    return Head.of(model, decoder(model), IDS)


def test_scale_soft_cap_and_bias_are_those_of_the_architecture(tiny_model):
    for architecture, scale, softcap in [
        ("llama", 1.0, None),
        ("gemma2", 1.0, 5.0),
        ("granite", 1 / 0.7, None),
        ("cohere", 1.5, None),
    ]:
        head = head_of(tiny_model(architecture))
        assert (head.scale, head.softcap, head.bias) == (pytest.approx(scale, rel=1e-6), softcap, None)
    gptj = tiny_model("gptj")
    assert gptj.lm_head.bias.abs().min() > 0
    assert head_of(gptj).bias.equal(gptj.lm_head.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["falcon_h1", "hyperclovax", "minicpm3", "inkling_text", "recurrent_gemma", "muse_glimmer", "granite"],
)
def test_whole_distributions_are_the_models_own(name, dtype):
    """In bfloat16 up to the rounding of logits, not to the half nat that would hide a multiplier."""
    model = tiny_models.tiny_model(name).to(dtype)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=1, rank=1))
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ensemble.disable_adapters():
        logits = model(input_ids=ids).logits.float()
        hidden = ensemble(ids)[0]
        vocabulary = torch.arange(logits.shape[-1]).expand(6, -1)
        ours = ensemble.label_logprob(hidden[0, :, None].expand(-1, logits.shape[-1], -1).contiguous(), vocabulary)
    theirs = torch.log_softmax(logits, -1)[0]
    rounding = torch.finfo(dtype).eps * float(logits.abs().max())
    assert (ours - theirs).abs().max() < 4 * rounding + 1e-4


class Odd(LlamaForCausalLM):
    """A Llama whose head does something more, a little of it."""

    def __init__(self, config, before=None, after=None):
        super().__init__(config)
        self.before, self.after = before or torch.nn.Identity(), after or (lambda z: z)

    def forward(self, input_ids, **kwargs):
        out = self.model(input_ids=input_ids, use_cache=False)
        out.logits = self.after(self.lm_head(self.before(out.last_hidden_state)))
        return out


@pytest.mark.parametrize(
    "change",
    [
        {"before": torch.nn.LayerNorm(32)},
        {"before": torch.nn.Linear(32, 32)},
        {"after": lambda z: z + 0.01},
        {"after": lambda z: z * 1.001**z},
        {"after": lambda z: z.masked_fill(torch.arange(z.shape[-1]) == 5, -1e9)},
        {"after": lambda z: z.sort(-1).values},
        {"after": torch.relu},
    ],
    ids=["norm", "layer", "offset", "curve", "mask", "sort", "relu"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_multiplication_is_refused(change, dtype):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = Odd(config, **change).to(dtype).eval()
    with pytest.raises(
        ValueError, match=r"Odd (transforms its logits in an unknown way|cannot turn the hidden states)"
    ):
        LoraEnsemble.attach(model)


@pytest.mark.parametrize("scale", [0.0078125, 3.7, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_multiplier_is_found(scale, dtype):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    head = head_of(Odd(config, after=lambda z: scale * z).to(dtype).eval())
    assert head.scale == pytest.approx(scale, rel=1e-6)
