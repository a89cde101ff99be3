"""METEOR and SPICE: the Java programs of the optional package pycocoevalcap, on the words of our tokenizer.

Nothing is downloaded here. That package holds METEOR whole, but of SPICE not the parser, which its Python
wrapper would fetch by itself, without encryption and without a checksum: it is only called where the parser
is in place already.
"""

import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pipelines.metrics import Id, check_ids, tokenize

Extra = Literal["meteor", "spice"]

PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def refuse_absent(extra: Collection[Extra]) -> None:
    """Errors: ValueError that says what the metrics in `extra` need and this machine lacks."""
    if not extra:
        return
    asked = f"extra asks for {' and '.join(extra)}"
    package = find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            f"{asked}, which needs pycocoevalcap, and that is not installed: pip install pycocoevalcap, or "
            "leave extra out"
        )
    if shutil.which("java") is None:
        raise ValueError(
            f"{asked}, a Java program, and there is no java on the PATH; install a Java runtime, or leave "
            "extra out"
        )
    place = Path(package.submodule_search_locations[0], "spice", "lib")
    absent = [name for name in PARSER if not (place / name).is_file()]
    if "spice" in extra and absent:
        raise ValueError(
            f"{asked}, and {place} lacks SPICE's parser: put {' and '.join(absent)} there by hand, out of "
            "stanford-corenlp-full-2015-12-09.zip, as nothing is downloaded here; or leave spice out of extra"
        )


def meteor(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[float, dict[Id, float]]:
    """(METEOR of the corpus, {id: METEOR}), in [0, 1]; of the corpus, statistics are summed first.

    Source: Denkowski and Lavie 2014, METEOR 1.5 in English. Errors: ValueError as `refuse_absent`, or for a
    corpus that `check_ids` refuses.
    """
    check_ids(hypotheses, references)
    refuse_absent(["meteor"])
    scorer = import_module("pycocoevalcap.meteor.meteor").Meteor()
    corpus, each = scorer.compute_score(*_words(hypotheses, references))
    return corpus, dict(zip(hypotheses, each, strict=True))


def spice(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[float, dict[Id, float]]:
    """(mean, {id: SPICE}), in [0, 1]: the F-score of what parsed captions say.

    Source: Anderson et al. 2016. Errors: as `meteor`, and ValueError where its program fails.
    """
    check_ids(hypotheses, references)
    refuse_absent(["spice"])
    scorer = import_module("pycocoevalcap.spice.spice").Spice()
    numbers = {str(number): key for number, key in enumerate(hypotheses)}  # its program knows texts alone
    told = [
        {number: found[key] for number, key in numbers.items()} for found in _words(hypotheses, references)
    ]
    try:
        corpus, each = scorer.compute_score(*told)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"SPICE's Java program failed (status {error.returncode}); it is known to run on Java 8 and 11, "
            "not on 16 and newer: put an older java first on the PATH, or leave spice out of extra"
        ) from error
    return float(corpus), {
        numbers[number]: found["All"]["f"] for number, found in zip(sorted(numbers), each, strict=True)
    }


def _words(
    hypotheses: Mapping[Id, str], references: Mapping[Id, Sequence[str]]
) -> tuple[dict[Id, list[str]], dict[Id, list[str]]]:
    """References and hypotheses, as the programs want them: words with one space between them."""
    wanted = {key: [" ".join(tokenize(text)) for text in references[key]] for key in hypotheses}
    return wanted, {key: [" ".join(tokenize(text))] for key, text in hypotheses.items()}
