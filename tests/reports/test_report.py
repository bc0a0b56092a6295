"""The report: one page that stands alone, whoever wrote what it shows."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deploykit.bundle import read_manifest, write_manifest
from deploykit.cli.main import main
from deploykit.errors import BundleError, MissingDependency, SpecError, StorageError
from deploykit.loading import load_bundle
from deploykit.reports.errors import errors_apart
from deploykit.reports.write import write_report

BUNDLES = Path(__file__).parent.parent / "data" / "bundles-0.1.0"
THREE = [BUNDLES / name for name in ("onnxruntime-int8", "openvino-int8", "tensorrt-int8")]
HOSTILE = '<img src=x onerror="alert(1)">|`x`'


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report on four bundles, of which some do not run here."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path_factory.mktemp("report")
    another = shutil.copytree(THREE[0], folder / "another")
    write_report([*THREE, another], folder / "report.html")
    return folder / "report.html"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_it_is_small_and_needs_nothing_else(page):
    text = page.read_text()
    assert len(text) < 1_000_000
    found = Elements(text)
    assert not {"script", "iframe", "img", "object", "embed"} & {tag for tag, _ in found.tags}
    links = [attributes.get("href") or attributes.get("src") for _, attributes in found.tags]
    links += [attributes.get("xlink:href") for _, attributes in found.tags]
    assert {link for link in links if link and not link.startswith(("data:", "#"))} == set()
    assert not re.search(r"url\((?!#)|@import", text)


def test_it_says_what_each_bundle_gives(page):
    found = Elements(page.read_text())
    for title in (
        "Summary",
        "Error of each level",
        "Three errors apart",
        "What the quantizer did",
        "How it was made and where it runs",
    ):
        assert title in found.text
    assert all(bundle.name in found.text for bundle in THREE)
    assert "tensorrt-int8 did not run here" in found.text
    drawn = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(drawn) >= 5
    for svg in drawn:
        ElementTree.fromstring(re.sub(r"<svg ", '<svg xmlns:xlink="x" ', svg, count=1))  # noqa: S314
        assert not re.search(r"#[0-9a-f]{6}", svg), "every colour comes from the page"


def test_three_errors_are_told_apart(tmp_path):
    """An engine said to be FP32, INT8 in the same runtime, and INT8 of the same calibration in another."""
    said = shutil.copytree(THREE[0], tmp_path / "said")
    manifest = read_manifest(said)
    for name in ("manifest.json", "manifest.sha256"):
        (said / name).unlink()
    write_manifest(said, dataclasses.replace(manifest, precision="fp32", precision_settings={"min_sqnr_db": 30.0}))
    with load_bundle(said) as full, load_bundle(THREE[0]) as one, load_bundle(THREE[1]) as other:
        errors = errors_apart({"full": full, "one": one, "other": other})
    found = {(each.kind, each.bundle, each.against): each.sqnr_db for each in errors if each.level == "stage1"}
    assert set(found) == {
        ("conversion", "full", "torch fp32"),
        ("quantization", "one", "full"),
        ("runtime", "other", "one"),
    }
    assert 30 < found["conversion", "full", "torch fp32"] < 60
    assert found["quantization", "one", "full"] == 300.0
    assert 30 < found["runtime", "other", "one"] < 300


def test_no_two_drawings_share_an_id(page):
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))


def test_without_running_it_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("a.html", "b.html"):
        write_report(THREE[:1], tmp_path / name, run=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_nothing_in_a_manifest_acts_on_the_page(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    bundle = shutil.copytree(THREE[0], tmp_path / "bundle")
    manifest = read_manifest(bundle)
    for name in ("manifest.json", "manifest.sha256"):
        (bundle / name).unlink()
    write_manifest(bundle, dataclasses.replace(manifest, seen_on={"processor": HOSTILE}, target=HOSTILE))
    write_report([bundle], tmp_path / "report.html", run=False)
    found = Elements((tmp_path / "report.html").read_text())
    assert "img" not in {tag for tag, _ in found.tags}
    assert HOSTILE in found.text
    write_report([bundle], tmp_path / "report.md", run=False)
    assert r"\<img src=x onerror=" in (tmp_path / "report.md").read_text()
    assert r"\|\`x\`" in (tmp_path / "report.md").read_text()


def test_markdown_has_the_tables_and_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    facts = write_report(THREE[:2], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count(r"\|") for line in rows[:4]}) == 1
    assert text.count("<details>") == text.count("</details>") == 2
    assert all(each.here is not None and each.latency_ms for each in facts)
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        write_report(THREE[:1], tmp_path / "report.html", run=False)
    assert not (tmp_path / "report.html").exists()


def test_the_layers_of_an_onnx_graph_are_shown_where_they_are_asked_for(tmp_path):
    facts = write_report(THREE[:2], tmp_path / "report.md", run=False, layers=True)
    assert [each.layers is not None for each in facts] == [True, False]
    worst = min(facts[0].layers.layers, key=lambda layer: layer.own_db)
    assert f"| {worst.own_db:.1f} |" in (tmp_path / "report.md").read_text()


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"neither \.html nor \.md"):
        write_report(THREE[:1], tmp_path / "report.pdf")
    with pytest.raises(SpecError, match="0 bundles"):
        write_report([], tmp_path / "report.md")
    with pytest.raises(BundleError, match="nothing has that name"):
        write_report([tmp_path / "absent"], tmp_path / "report.md")
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(THREE[:1], tmp_path / "absent" / "report.md", run=False)


def test_two_bundles_of_one_name_are_told_apart(tmp_path):
    pair = [shutil.copytree(THREE[0], tmp_path / when / "net") for when in ("old", "new")]
    facts = write_report(pair, tmp_path / "report.md", run=False)
    assert [each.name for each in facts] == ["old/net", "new/net"]


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    assert main(["report", str(THREE[0]), "-o", str(tmp_path / "report.md"), "--no-run"]) == 0
    said = capsys.readouterr().out
    assert "1 bundle, " in said
    assert "none is outside its budget" in said
    assert main(["report", str(THREE[0]), "-o", str(tmp_path / "report.txt")]) == 2


def test_the_command_tells_a_program_what_the_page_says(tmp_path, capsys):
    output = str(tmp_path / "report.md")
    assert main(["report", str(THREE[0]), "-o", output, "--no-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["report"] == output
    bundle = told["bundles"][0]
    assert (bundle["name"], bundle["passed"], bundle["device"]) == (THREE[0].name, True, None)
    assert min(level["sqnr_db"] for level in bundle["levels"]) == bundle["worst_db"]


@pytest.fixture(scope="module")
def browser() -> str:
    names = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    return found or pytest.skip("no Chromium here")


def _browse(browser, page, folder, *options):
    command = [
        browser,
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_shows_it_without_errors_or_requests(browser, page, tmp_path):
    log = tmp_path / "net.json"
    done = _browse(browser, page, tmp_path, "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom")
    assert "Error of each level" in done.stdout
    assert "CONSOLE" not in done.stderr
    urls = set(re.findall(r'"url":"(https?:[^"]+)"', log.read_text())) if log.exists() else set()
    assert not {url for url in urls if "127.0.0.1" not in url}


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(browser, page, tmp_path, width):
    """The page allows no script, so that a copy is measured which does."""
    script = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
    measured = tmp_path / "measured.html"
    measured.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", f"{script}</body>"))
    done = _browse(browser, measured, tmp_path, f"--window-size={width},800", "--dump-dom")
    inside, outside = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert inside <= outside <= width
