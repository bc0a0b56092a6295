"""The pytest plugin: ``pytest --deploykit-bundle dist/*`` tests bundles, and the fixture ``parity`` one's own engines.

Nothing but pytest is imported until one of them is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deploykit.parity.report import LevelParity, ParityReport

MARKER = "deploykit"
WHOLE = "whole"
"""The name of the test that checks every file of a bundle."""

_REPORTS = pytest.StashKey["dict[tuple[str, str], ParityReport | Exception]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options ``--deploykit-bundle`` and ``--deploykit-device``."""
    group = parser.getgroup("deploykit", "engines of deploykit")
    group.addoption(
        "--deploykit-bundle",
        action="extend",
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="test these bundles: every file, and every output on every device",
    )
    group.addoption(
        "--deploykit-device",
        action="extend",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="where the bundles' engines run (default: each runtime's first device)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker that every test of a bundle has."""
    config.addinivalue_line("markers", f"{MARKER}: a bundle or an engine of deploykit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests of the bundles that are named on the command line."""
    devices = config.getoption("--deploykit-device") or ["auto"]
    for bundle in dict.fromkeys(config.getoption("--deploykit-bundle")):
        node = _Bundle.from_parent(session, name=bundle, nodeid=bundle)
        items += node.tests(devices)


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Hold engines against references; every figure goes into the JUnit report."""
    return Parity(request.node.user_properties)


class Parity:
    """What the fixture ``parity`` gives.

    Args:
        properties: of the test, for JUnit.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def assert_parity(self, *arguments: Any, **options: Any) -> ParityReport:
        """See `deploykit.assertion.assert_parity`."""
        __tracebackhide__ = True
        from deploykit.assertion import compare_models

        return self._checked(compare_models(*arguments, **options))

    __call__ = assert_parity

    def verify(self, bundle: Any, **options: Any) -> ParityReport:
        """Run a bundle's engine on the reference inside and fail outside its budget; see `deploykit.verify_bundle`.

        Raises:
            ParityError: outside the budget; the message has the table.
        """
        __tracebackhide__ = True
        from deploykit.verification import verify_bundle

        return self._checked(verify_bundle(bundle, **options))

    def _checked(self, report: ParityReport) -> ParityReport:
        """Note every figure of a report for JUnit, and fail where it does not pass."""
        __tracebackhide__ = True
        for level in report.levels:
            self._properties += [(f"{level.name}.{name}", value) for name, value in _figures(level)]
        if not report.passed:
            from deploykit.assertion import failure_text
            from deploykit.errors import ParityError

            raise ParityError(failure_text(report))
        return report


class _Bundle(pytest.Collector):
    """One bundle of the command line."""

    def collect(self) -> list[pytest.Item]:
        """Return every test, on the default device."""
        return self.tests(["auto"])

    def tests(self, devices: Sequence[str]) -> list[pytest.Item]:
        """Return one test of the files, and one of each output on each device."""
        names = [(WHOLE, None), *((output, device) for device in devices for output in self._outputs())]
        return [_item(self, output, device) for output, device in names]

    def _outputs(self) -> tuple[str, ...]:
        """Return the names in the manifest; none where it cannot be read, which the test of the files then says."""
        from pathlib import Path

        from deploykit.bundle import read_manifest
        from deploykit.errors import DeployKitError

        try:
            return tuple(output.name for output in read_manifest(Path(self.name)).outputs)
        except DeployKitError:
            return ()


class _Files(pytest.Item):
    """Every file of a bundle is what its manifest says."""

    def runtest(self) -> None:
        """Check the digests.

        Raises:
            BundleError: the bundle is damaged.
        """
        from pathlib import Path

        from deploykit.bundle import open_bundle

        manifest = open_bundle(Path(str(getattr(self.parent, "name", ""))))
        about = {"backbone": manifest.backbone.name, "runtime": manifest.runtime, "precision": manifest.precision}
        self.user_properties += list(about.items())

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the error's message alone."""
        return _message(self, excinfo)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Return the bundle and the name of the test."""
        return self.path, None, self.nodeid


class _Output(_Files):
    """One output of an engine is within its budget on one device."""

    output: str = ""
    device: str = ""

    def runtest(self) -> None:
        """Look up the level in the report of this engine, which is made once.

        Raises:
            LevelFailed: it is outside the budget.
            DeployKitError: the engine cannot run here.
        """
        bundle = str(getattr(self.parent, "name", ""))
        report = _report(self.config, bundle, self.device)
        level = next(each for each in report.levels if each.name == self.output)
        self.user_properties += [("device", self.device), *_figures(level)]
        if not level.passed:
            from deploykit.assertion import failure_text

            raise LevelFailed(failure_text(report))


class LevelFailed(Exception):
    """A level is outside its budget; the message is the report's table."""


def _item(parent: _Bundle, output: str, device: str | None) -> pytest.Item:
    item: _Files
    if device is None:
        item = _Files.from_parent(parent, name=output)
    else:
        item = _Output.from_parent(parent, name=f"{output}[{device}]")
        item.output, item.device = output, device
    item.add_marker(MARKER)
    return item


def _report(config: pytest.Config, bundle: str, device: str) -> ParityReport:
    """Verify a bundle on a device, once in this process; an error is kept and raised for each of its levels."""
    from deploykit.errors import DeployKitError
    from deploykit.verification import verify_bundle

    reports = config.stash.setdefault(_REPORTS, {})
    if (bundle, device) not in reports:
        try:
            reports[bundle, device] = verify_bundle(bundle, device=device)
        except DeployKitError as error:
            reports[bundle, device] = error
    found = reports[bundle, device]
    if isinstance(found, Exception):
        raise found
    return found


def _message(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
    from deploykit.errors import DeployKitError

    if isinstance(excinfo.value, (DeployKitError, LevelFailed)):
        return f"{type(excinfo.value).__name__}: {excinfo.value}"
    return pytest.Item.repr_failure(item, excinfo)


def _figures(level: LevelParity) -> Iterator[tuple[str, object]]:
    for name in ("sqnr_db", "cosine", "relative_l2", "max_abs", "top1_agreement", "agreement_db"):
        value = getattr(level, name, None)
        if value is not None:
            yield name, round(value, 6)
