"""Which judge is made, and what none of them sees."""

from __future__ import annotations

import huggingface_hub.constants
import pytest

from renyi_engine.evaluation.refusal.endpoint import Endpoint
from renyi_engine.evaluation.refusal.endpoint_judge import EndpointJudge
from renyi_engine.evaluation.refusal.judges import make_judge
from renyi_engine.evaluation.refusal.keyword_judge import KeywordJudge
from renyi_engine.evaluation.refusal.verdicts import UNFINISHED, UNPARSED, Exchange, judge_prompt

from .conftest import CPU, THOUGHT, completion


def test_a_judge_is_shown_the_answer_without_its_thought_and_nothing_of_one_that_has_none_yet(serve, plays):
    responses = [f"<think>{THOUGHT}</think>\nNo.", f"<think>{THOUGHT}", "No."]
    exchanges = [Exchange("Hi", response) for response in responses]
    url, requests = serve((200, completion("direct_refusal")))
    local, prompts, _ = plays("asked", ["direct_refusal<|im_end|>"] * 2)
    for judge in (EndpointJudge(url, "m"), local, KeywordJudge()):
        verdicts = judge(exchanges)
        assert [v.label for v in verdicts][1] == UNPARSED
        assert verdicts[1].basis == UNFINISHED
    shown = judge_prompt(Exchange("Hi", "No."))
    assert [body["messages"][0]["content"] for _, _, body in requests] == [shown] * 2
    assert [shown in prompt and THOUGHT not in prompt for prompt in prompts[0]] == [True] * 2


def test_a_judge_that_cannot_be_is_refused_in_one_line(model_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for spec in ("", "keywords", "model:", "endpoint:", "endpoint:localhost:8000", "gpt"):
        with pytest.raises(ValueError, match="judge: expected keyword, model:FOLDER_OR_HUB_ID or endpoint:BASE_URL"):
            make_judge(spec, compute=CPU, model="m")
    with pytest.raises(ValueError, match="judge_model: expected the name of the model at the endpoint"):
        make_judge("endpoint:http://localhost/v1", compute=CPU)
    with pytest.raises(ValueError, match="judge: expected endpoint:http://HOST:PORT/v1"):
        Endpoint("http://h:port/v1", api_key=None, timeout_s=1)
    with pytest.raises(ValueError, match="judge: the endpoint's address holds a name or a password") as error:
        make_judge("endpoint:http://me:sk-123@localhost/v1", compute=CPU, model="m")
    assert "sk-123" not in str(error.value)  # it would be written into the results
    with pytest.raises(ValueError, match="unset HF_HUB_OFFLINE"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        make_judge("endpoint:http://localhost/v1", compute=CPU, model="m")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="judge_api_key_env") as error:
        make_judge("endpoint:http://localhost/v1", compute=CPU, model="m", api_key_env="NO_SUCH_KEY")
    assert "NO_SUCH_KEY" not in str(error.value)  # it may be the key itself
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_judge(f"model:{tmp_path / 'nowhere'}", compute=CPU)
    for file in model_folder.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="no chat template"):
        make_judge(f"model:{tmp_path}", compute=CPU)
