"""What a watch has said: its findings, the file that they are written to, and what need not be said again."""

import json
import sys
from contextlib import suppress
from pathlib import Path

from ..findings import SEVERITIES, Finding

STANDS = "what was found before stands; the training itself is not affected"
FAILED_TWICE = "the watch failed, and failed again while it said so"
LAST_WORDS = Finding("not_measured", "warning", "the watch", FAILED_TWICE, STANDS)  # made before anything can go wrong


class Published:
    """Findings in their order. Each rule names a subject (a kind of tensor, a group, the loss) once at a severity, and not at a
    lower one afterwards. Each is printed to stderr when it is made, unless `quiet`.

    A resumed run's begins with what stands in its file up to `start_step`. The file does not hold subjects: those rules name
    nothing more at that severity.
    """

    def __init__(self, log: str | Path | None, start_step: int, quiet: bool):
        self.quiet = quiet
        self.log = None if log is None else Path(log)
        self.findings = open_log(self.log, start_step) if self.log else []
        # by rule and subject (None: all), the gravest severity told
        self.gravest: dict[tuple[str, str | None], int] = {}
        for finding in self.findings:
            self.note(finding, [finding.where if finding.rule == "not_measured" else None])

    def note(self, finding: Finding, subjects: list[str | None]) -> None:
        for key in ((finding.rule, subject) for subject in subjects):
            level = SEVERITIES.index(finding.severity)
            self.gravest[key] = min(level, self.gravest.get(key, level))

    def is_news(self, rule: str, severity: str, subject: str) -> bool:
        before = min(self.gravest.get((rule, key), len(SEVERITIES)) for key in (subject, None))
        return SEVERITIES.index(severity) < before

    def say(self, line: str) -> None:
        """To stderr, wherever that is by now: a closed or full one ends no training."""
        if line and not self.quiet and sys.stderr is not None:
            with suppress(OSError, ValueError):
                print(" ".join(line.split()), file=sys.stderr, flush=True)

    def add(self, finding: Finding, subjects: list[str]) -> None:
        self.note(finding, subjects)
        self.findings.append(finding)
        self.say(str(finding))
        if self.log:
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finding.to_dict(), ensure_ascii=False) + "\n")
            except OSError as error:
                path, self.log = self.log, None
                self.add_failure(error, str(path), "findings are no longer written there", finding.step)

    def add_failure(self, error: Exception, where: str, what: str, step: int | None, severity: str = "warning") -> None:
        """Say once for each `where` what cannot be measured."""
        if self.is_news("not_measured", severity, where):
            message = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.add(Finding("not_measured", severity, where, message, STANDS, step=step), [where])


def open_log(path: Path, start_step: int) -> list[Finding]:
    """What a resumed run has found before, from a file that can be appended to; its folder is made if need be.

    Findings beyond `start_step`, and a line that a kill cut short, are taken out of the file of a resumed run; that of a new
    one is left as it is. Raises ValueError if the file cannot be written or holds something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if start_step else []
        told = [(line, Finding(**json.loads(line))) for line in lines if line.endswith("\n")]
        kept = [(line, finding) for line, finding in told if (finding.step or 0) <= start_step]
        if len(kept) < len(lines):
            temporary = path.with_name(path.name + ".part")
            temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise ValueError(f"log={str(path)!r} cannot be written: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"log={str(path)!r} holds no findings: {error}; give another, or move it") from error
    return [finding for _, finding in kept]
