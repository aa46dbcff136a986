"""The notebook of the two camps: it runs as committed, from an empty folder, and what its text says is so."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "two_camps.ipynb"

# runs in the notebook's own process, after its last cell; responsibilities are [particles, rows]
CLAIMS = {
    "some coupled particles take the rows that say yes, the others those that say no": """
        yes, no = responsibilities["coupled"][:, :12], responsibilities["coupled"][:, 12:24]
        takes_yes = yes.mean(dim=1) > no.mean(dim=1)
        assert 0 < takes_yes.sum() < 4
        assert (yes[takes_yes].sum(dim=0) > 0.9).all()
        assert (no[~takes_yes].sum(dim=0) > 0.9).all()
    """,
    "where all agree, coupled particles are equally responsible": """
        assert (responsibilities["coupled"][:, 24:] - 0.25).abs().max() < 0.05
    """,
    "uncoupled particles are equally responsible for everything": """
        assert (responsibilities["uncoupled"] - 0.25).abs().max() < 0.05
    """,
    "both ensembles are unsure of the contested questions and sure of the agreed ones": """
        for said in uncertainty.values():
            assert (said.total[:4] > 0.5).all()
            assert (said.total[4:] < 0.1).all()
    """,
    "each uncoupled particle is unsure by itself; of the coupled ones each is sure, and they disagree": """
        for name, part in (("uncoupled", "aleatoric"), ("coupled", "epistemic")):
            assert (getattr(uncertainty[name], part)[:4] > 0.8 * uncertainty[name].total[:4]).all()
    """,
    "the folder that it names holds a report and an adapter for each particle": """
        assert (folder / "coupled" / "report.html").is_file()
        assert len(list((folder / "coupled" / "particles").glob("p*/adapter_model.safetensors"))) == 4
    """,
}


def printed(cell) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run in an empty folder, with an empty home and no hub; the claims are its last cells."""
    folder = tmp_path_factory.mktemp("empty")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for claim in CLAIMS.values():
        notebook.cells.append(nbformat.v4.new_code_cell("if True:" + claim))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOME", "IPYTHONDIR", "TMPDIR"):
            patch.setenv(name, str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        client = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, timeout=500, allow_errors=True)
        return client.execute()


def errors(cell) -> list[str]:
    return ["\n".join(output["traceback"]) for output in cell["outputs"] if output["output_type"] == "error"]


def test_it_is_committed_without_what_a_run_leaves_in_it():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert cell["metadata"] == {}


def test_it_runs_and_draws_two_pictures(executed):
    cells = [cell for cell in executed.cells if cell["cell_type"] == "code"][: -len(CLAIMS)]
    assert [errors(cell) for cell in cells] == [[]] * len(cells)
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.parametrize("number", range(len(CLAIMS)), ids=list(CLAIMS))
def test_what_its_text_says_is_so(executed, number):
    assert errors(executed.cells[number - len(CLAIMS)]) == []


def test_coupled_particles_answer_the_contested_question_differently_and_the_agreed_one_alike(executed):
    (text,) = [printed(cell) for cell in executed.cells if "generate(" in cell["source"]]
    contested, agreed = re.findall(r"^coupled: .*\n((?: +particle .*\n)+)", text, re.M)
    contested, agreed = (set(re.findall(r"particle \d: (.*)", part)) for part in (contested, agreed))
    assert contested == {"yes , with pleasure .", "no , certainly not ."}
    assert agreed == {"always ."}
