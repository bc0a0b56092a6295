"""Every Python block of README.md and docs/ runs, in order, and prints what stands below it.

``sh`` blocks run too: each line is a deploykit command, which must exit with 0 or with what ``# exit code N`` says.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.warm_process import WarmProcess

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
LINKED = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md")
SLOW_MARK = "<!-- slow -->"
WHOLLY_SLOW = ("README.md", "contract.md", "tutorial.md", "optimization.md")
"""What they show has quick tests of its own; the slow tests run the pages themselves.

Those of the README are test_facade.py's test_photographs_get_their_class_in_every_runtime, and those of the contract
tests/backbones/test_contract.py.
"""
BLOCK = re.compile(
    r"(?P<slow><!-- slow -->\n+)?^```(?P<language>python|sh)\n(?P<code>.*?)^```\n"
    r"(?:\n*^```(?:text)?\n(?P<printed>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
REPOSITORY = re.search(r'^Source = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
OWN_LINK = re.compile(rf"\]\({re.escape(REPOSITORY)}/(?:blob|tree)/main/([^)#\s]*)#?([^)\s]*)\)")
"""A link that also works on a package index's page, which knows no other file of the repository."""

RUNNER = """
import contextlib, io, json, re, shlex, sys

def run_commands(code):
    from deploykit.cli.main import main
    for line in code.replace("\\\\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        said = re.search("# exit code ([0-9]+)", line)
        assert words[0] == "deploykit", line
        code = main(words[1:])
        assert code == (int(said[1]) if said else 0), f"{line} ends with {code}"

blocks = json.loads(sys.stdin.read())
namespace, answers = {"__name__": "page"}, []
for line, language, code in blocks:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "sh":
            run_commands(code)
        else:
            exec(compile("\\n" * line + code, sys.argv[1], "exec"), namespace)
    answers.append(out.getvalue())
print(json.dumps(answers))
"""
"""Runs the blocks of one page in one namespace; prints what each of them printed."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block: ``line`` is that of its fence, ``printed`` what the page says below it, or None."""

    line: int
    language: str
    code: str
    printed: str | None
    slow: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            line=text.count("\n", 0, match.start("code")),
            language=match["language"],
            code=match["code"],
            printed=match["printed"],
            slow=match["slow"] is not None,
        )
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    process = WarmProcess()
    yield process
    process.close()


@pytest.fixture
def check(folder, warm) -> Callable[..., None]:
    """Run a page's blocks in ``folder`` with one process for all of them, and compare what they print."""

    def run_and_compare(page: Path, *, slow: bool) -> None:
        blocks = [block for block in blocks_of(page) if slow or not block.slow]
        if "timm/" in "".join(block.code for block in blocks) and importlib.util.find_spec("timm") is None:
            pytest.skip("timm is not installed")
        asked = json.dumps([(block.line, block.language, block.code) for block in blocks])
        environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
        done = warm.run(RUNNER, page.name, stdin=asked, cwd=folder, environment=environment)
        assert done.returncode == 0, done.stderr
        for block, printed in zip(blocks, json.loads(done.stdout), strict=True):
            if block.printed is not None:
                assert printed == block.printed, f"{page.name}, the block at line {block.line}"

    return run_and_compare


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """A cache of the model hub with random weights of a ResNet-50, which a page asks for with pretrained=True."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    from deploykit import create_backbone

    root = tmp_path_factory.mktemp("hub")
    snapshot = root / "models--timm--resnet50.a1_in1k" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0")
    safetensors.save_file(create_backbone("resnet50").state_dict(), str(snapshot / "model.safetensors"))
    return root


@pytest.fixture
def folder(tmp_path, photographs) -> Path:
    """A working folder with what the pages take for given: a folder of photographs, and a photograph."""
    shutil.copytree(photographs, tmp_path / "photos")
    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    shutil.copy(Path(skimage_data.__file__).parent / "chelsea.png", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page) and page.name not in WHOLLY_SLOW], ids=lambda page: page.name
)
def test_blocks_run_and_print_what_the_page_says(page, check):
    check(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name in WHOLLY_SLOW or any(block.slow for block in blocks_of(page))],
    ids=lambda page: page.name,
)
def test_slow_blocks_run_and_print_what_the_page_says(page, check, folder, request):
    if page.name == "contract.md":
        (folder / "hub").symlink_to(request.getfixturevalue("hub"))
    check(page, slow=True)


def test_every_block_of_the_pages_is_found():
    for page in PAGES:
        fences = re.findall(r"^ *```(?:python|sh)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(blocks_of(page)) == len(fences), page.name


SNIPPETS = (
    """    def __init__(self, config):
        super().__init__()
        self.build_backbone(config)
""",
    """    name="resnet50",
    pretrained=True,
    features_only=True
""",
    """    "efficient_net",
    output_indices=(2, 3, 4),
    features_only=True
""",
    """    "vit",
    patch_size=16,
    hierarchical=True
""",
    """        features = self.backbone(x)
        return [features[i] for i in self.output_indices]
""",
    """        self.fpn = build_fpn(fpn_channels)

    def forward(self, x):
        features = self.backbone(x)
        return self.fpn(features)
""",
)
"""From the design document, as they stand there."""


def test_the_contract_shows_the_snippets_of_the_design_document_word_for_word():
    code = "\n".join(block.code for block in blocks_of(ROOT / "docs" / "contract.md"))
    assert [snippet for snippet in SNIPPETS if snippet not in code] == []


def test_a_block_that_prints_something_else_is_noticed(check, folder):
    page = folder / "page.md"
    page.write_text("```python\nx = 1\n```\n\ntext\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, the block at line 7"):
        check(page, slow=False)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("deploykit inspect nowhere", "ends with 3"), ("deploykit --version  # exit code 2", "ends with 0"), ("ls", "ls")],
)
def test_a_command_that_ends_otherwise_is_noticed(check, folder, line, complaint):
    page = folder / "page.md"
    page.write_text(f"```sh\n{line}\n```\n")
    with pytest.raises(AssertionError, match=complaint):
        check(page, slow=False)


def test_a_command_that_ends_as_the_page_says_passes(check, folder):
    page = folder / "page.md"
    page.write_text("```sh\ndeploykit inspect \\\n    nowhere  # exit code 3\n```\n")
    check(page, slow=False)


def test_slow_blocks_wait_for_the_slow_run(check, folder):
    page = folder / "page.md"
    page.write_text(f"{SLOW_MARK}\n```python\nraise ValueError\n```\n")
    check(page, slow=False)
    with pytest.raises(AssertionError, match="ValueError"):
        check(page, slow=True)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [(page.parent / target if target else page, heading) for target, heading in LINK.findall(text)]
    targets += [(ROOT / target, heading) for target, heading in OWN_LINK.findall(text)]
    for path, heading in targets:
        assert path.exists(), f"{page.name} links {path.relative_to(ROOT)}"
        if heading:
            assert heading in anchors_of(path), f"{page.name} links {path.relative_to(ROOT)}#{heading}"


def anchors_of(page: Path) -> set[str]:
    headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in headings}


def test_the_readme_links_as_a_package_index_needs_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not LINK.findall(text)
    assert len(re.findall(r"\]\(https?:", text)) == len(OWN_LINK.findall(text)), "a link into another repository"


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_drawings_are_svg_with_a_background_of_their_own(drawing):
    root = ElementTree.parse(drawing).getroot()  # noqa: S314  (a file of this repository)
    namespace = "{http://www.w3.org/2000/svg}"
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    assert root.tag == f"{namespace}svg"
    assert root.find(f"{namespace}title") is not None
    first = next(child for child in root if child.tag == f"{namespace}rect")
    assert (float(first.attrib["width"]), float(first.attrib["height"])) == (width, height)


@pytest.mark.parametrize("drawing", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda path: path.name)
def test_drawings_name_rooms_that_are_there(drawing):
    texts = re.findall(r'class="room"[^>]*>([^<]*)<', drawing.read_text(encoding="utf-8"))
    for room in [text for text in texts if "/" in text or text in ("export", "calibration")]:
        assert (ROOT / room).exists(), room
