from . import calibration as calibration
from .answer_policy import Policy as Policy, calibrate as calibrate, decide as decide
from .choices import (
    Choices as Choices,
    encode_choices as encode_choices,
    score_choices as score_choices,
)
from .config import (
    EvalConfig as EvalConfig,
    FitWeightsConfig as FitWeightsConfig,
    GenerateConfig as GenerateConfig,
    MmluConfig as MmluConfig,
    NllConfig as NllConfig,
    RefusalConfig as RefusalConfig,
)
from .fit_weights import fit_weights as fit_weights
from .generate import answer as answer
from .mmlu.evaluate import evaluate_mmlu as evaluate_mmlu
from .mmlu.questions import (
    COMPLETIONS as COMPLETIONS,
    Question as Question,
    load_questions as load_questions,
    prompt as prompt,
)
from .nll.evaluate import evaluate_nll as evaluate_nll
from .refusal.evaluate import evaluate_refusal as evaluate_refusal
from .refusal.keyword_judge import KeywordJudge as KeywordJudge
from .refusal.rates import (
    Estimate as Estimate,
    disagreement as disagreement,
    mean_over_prompts as mean_over_prompts,
    prompt_rates as prompt_rates,
    refusal_rate as refusal_rate,
    sampling_noise as sampling_noise,
    variance_over_particles as variance_over_particles,
    variance_within_prompts as variance_within_prompts,
)
from .refusal.verdicts import LABELS as LABELS, REFUSALS as REFUSALS, Exchange as Exchange
from .uncertainty import Predictive as Predictive, predictive as predictive
