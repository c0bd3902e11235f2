"""From dumps of probes to a march: which values of each field explain all that a board made."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as entry
from itertools import product
from pathlib import Path
from typing import Any, Literal

from jquant.board.asking import Question
from jquant.board.cases import Case, case_of
from jquant.board.dumps import Dumps, read_dumps
from jquant.board.networks import Network, network_of
from jquant.board.noise import Suspect, suspects
from jquant.board.probes import LIMITS, Probe, domains
from jquant.board.questions import Asked, questions_of
from jquant.board.searching import Searched, search
from jquant.board.sifting import SWITCHES, Exclusion, Sifted, sift
from jquant.board.telling import telling
from jquant.board.worlds import Worlds
from jquant.targets import NASH_E, dump, fields, value_of
from jquant.text import did_you_mean, format_table
from jquant.types import InputError, Model, Program, QConfigError, Target

State = Literal["decided", "undecided", "contradicted", "not asked", "held"]
_PATIENCE = 12  # questions that no world explains, before the rest is left


@dataclass(frozen=True)
class FieldFit:
    """What is known of a field.

    `state`     decided: one value is left. undecided: several are, which no dump tells apart. contradicted: no value
                explains `case`. not asked: no dump depends on it. held: it was given, and not asked
    `values`    those that are left; of a field that is contradicted, those that the other dumps leave
    `evidence`  for each value that is left out, a dump that excludes it
    `probes`    the dumps that depend on the field and were too many values together to be tried
    `ask`       of a network's undecided field, the probe of `probe()` whose dumps differ between values that are left,
                all else as in the fitted march; "" where none was found
    """

    field: str
    state: State
    values: tuple[Any, ...]
    evidence: tuple[Exclusion, ...] = ()
    probes: tuple[str, ...] = ()
    ask: str = ""


@dataclass(frozen=True)
class Fit:
    """What dumps say of a march.

    `fields`    by path, in the order of `jq.targets.fields()`
    `target`    a march that explains all that was explained: the decided values, and of the others, together, as many
                of `base` as can be
    `suspects`  dumps that nothing explains, with what is wrong with them where that was found
    `cases`     of each such dump the smallest failing case
    `problems`  files that are missing, extra or unreadable
    """

    fields: Mapping[str, FieldFit]
    target: Target
    base: Target
    suspects: tuple[Suspect, ...]
    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    _alive: tuple[Sifted | Searched, ...] = entry(default=(), repr=False, compare=False)

    def march_with(self, field: str, value: Any) -> Target:
        """A march with a value that a field is left with, which explains all that `target` explains.

        Of those the nearest to `base`. Its dumps show that the value is left because no dump tells it apart. Of a field
        with `probes` it may fail to explain these.

        Raises:
          InputError: the field is not left with the value.
        """
        worlds = [world for branch in self._alive if (world := branch.world(_wanted(self.base), field, value))]
        if not worlds:
            left = _values(self.fields[field].values) if field in self.fields else ""
            raise InputError(f"{field} is not left with {value!r}; it is with: {left or 'nothing'}")
        return _valid(self.base, _most_of(worlds, self.base), self.fields, field)

    def of(self, state: State) -> tuple[str, ...]:
        """The fields of a state."""
        return tuple(name for name, found in self.fields.items() if found.state == state)

    def dump(self, path: str | os.PathLike[str], name: str = "fitted") -> None:
        """Writes `target` as TOML or JSON, which `jq.targets.load` reads."""
        dump(self.target.with_fields({"name": name}), path)

    def table(self) -> str:
        """A row a field; below, suspects, failing cases and problems."""
        rows = [(f.field, f.state, _values(f.values), _why(f)) for f in self.fields.values()]
        lines = [format_table(("field", "state", "values", "why"), rows)]
        lines += [f"suspect: {suspect}" for suspect in self.suspects]
        lines += [str(case) for case in self.cases]
        lines += [f"problem: {text}" for text in self.problems]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "target": {"name": self.target.name, "fingerprint": self.target.fingerprint},
            "fields": {name: asdict(found) for name, found in self.fields.items()},
            "suspects": [asdict(suspect) for suspect in self.suspects],
            "cases": [asdict(case) for case in self.cases],
            "problems": list(self.problems),
        }


def _values(values: tuple[Any, ...]) -> str:
    if len(values) > 6:
        return f"{values[0]} ... {values[-1]} ({len(values)})"
    return ", ".join(map(str, values))


def _why(found: FieldFit) -> str:
    ask = [f"the probe {found.ask} would tell"] if found.ask else []
    return "; ".join([*_reasons(found), *ask]) or "-"


def _reasons(found: FieldFit) -> list[str]:
    if found.probes:
        return [f"too many values together in {', '.join(found.probes)}"]
    if not found.evidence:
        return []
    where = dict.fromkeys("/".join(e.where) for e in found.evidence)
    more = " and others" if len(where) > 3 else ""
    return [f"{len(found.evidence)} values excluded by {', '.join(list(where)[:3])}{more}"]


def fit(
    given: Sequence[Probe] | Model | Program,
    dumps: Mapping[str, Any] | Dumps | str | os.PathLike[str],
    *,
    base: Target | None = None,
    inputs: Mapping[str, Any] | None = None,
    held: Sequence[str] = (),
) -> Fit:
    """The values of the fields of a march that explain what a board made of probes, or of a network.

    Joint values are tried, so that a value is left out only where no values of the others go with it. Each node is
    asked alone, on the operands that the board dumped.

    Args:
      given: probes as `probe` made them, or a network. A calibrated model is lowered again for every march that is
        tried. A program is so only where its scales are enough; of nodes with parameters it has integers, which say
        nothing of a march for which they would have been others.
      dumps: of probes, {name of the probe: its dumps}, or a folder with a sub-folder for each probe. Of a network, as
        `read_dumps` gives them, a folder with a file for each value, or {value: integers}.
      base: gives the values that no dump decides, and the limits; the march of the network, or `NASH_E`.
      inputs: of a network, {graph input: real array}; then quantizing them is asked as well.
      held: of a network, fields whose value in `base` is known to be the board's, or patterns such as "rescale.max_*".

    Returns:
      A `Fit`.

    Raises:
      InputError: no dumps that tell anything; an input that is none; `inputs` or `held` with probes.
      QConfigError: a field that does not exist. FileNotFoundError: no folder.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jquant as jq
      >>> graph, params = jq.trace(lambda p, x: jnp.tanh(x), {}, jnp.zeros((1, 8)))
      >>> config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1 / 64))})
      >>> model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
      >>> _, dumps = jq.reference.run(jq.lower(model), np.linspace(-1, 1, 8, dtype=np.float32)[None])  # the "board"
      >>> jq.board.fit(model, dumps).fields["tables.entry_rounding"].values
      ('half_up', 'half_even', 'half_away')
    """
    if isinstance(given, Model | Program):
        return _fit_network(network_of(given, inputs), dumps, base, held)
    if inputs or held:
        raise InputError("`inputs` and `held` belong to a network; probes have inputs of their own, and ask all fields")
    if isinstance(dumps, Dumps):
        raise InputError("the dumps of probes are those of several networks: {name of the probe: its dumps}")
    return fit_asked([Asked(probe) for probe in given], dumps, base=base or NASH_E)


def _fit_network(network: Network, dumps: Any, base: Target | None, held: Sequence[str]) -> Fit:
    base, names = base or network.target, _matching(held)
    if isinstance(dumps, str | os.PathLike):
        dumps = read_dumps(dumps, names=list(network.expected))
    questions, problems = network.questions(dumps)
    if not questions:
        raise InputError(f"no dumps that tell anything: {'; '.join(problems[:5]) or 'no node with its operands'}")
    found = search(questions, base, names)
    problems += _behind(found)
    odd = suspects(found, questions) if found.unexplained else []
    return _with_probes(_assembled([found], [found], odd, tuple(problems), base, names))


def _with_probes(found: Fit) -> Fit:
    """For each undecided field the probe that would tell."""
    named = {
        name: replace(of, ask=telling(name, of.values, found.target)) if of.state == "undecided" else of
        for name, of in found.fields.items()
    }
    return replace(found, fields=named)


def _behind(found: Searched) -> list[str]:
    """Takes away the unexplained values that are made of an unexplained one: it may be the wrong one of the two."""
    wrong = {question.where[0] for question in found.unexplained}
    behind = [q for q in found.unexplained if wrong & set(q.answers.lone.operands) - {q.where[0]}]
    found.unexplained = [question for question in found.unexplained if question not in behind]
    return [
        f"{q.where[0]}: nothing explains it, nor its operand {next(v for v in q.answers.lone.operands if v in wrong)}"
        for q in behind
    ]


def _matching(patterns: Sequence[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(domains(), pattern)
        if not names:
            raise QConfigError(f"a fit has no field {pattern!r}{did_you_mean(pattern, domains())}")
        found |= dict.fromkeys(names)
    return tuple(found)


def fit_asked(
    asked: Sequence[Asked], dumps: Mapping[str, Dumps] | str | os.PathLike[str], *, base: Target = NASH_E
) -> Fit:
    """`fit` with answers that are kept from fit to fit."""
    given = dumps if isinstance(dumps, Mapping) else read_all(dumps, [one.probe for one in asked])
    questions, problems = questions_of(asked, given)
    if not questions:
        raise InputError(f"no dumps that tell anything: {'; '.join(problems[:5]) or 'no probes'}")
    branches = sift_all(questions)
    alive = [branch for branch in branches if not branch.unexplained]
    odd: list[Suspect] = []
    if not alive:
        branches = sift_all(questions, patience=_PATIENCE)
        fewest = min(len(branch.unexplained) for branch in branches)
        alive = [branch for branch in branches if len(branch.unexplained) == fewest]
        odd = suspects(alive[0], questions)
    return _assembled(alive, branches, odd, tuple(problems), base)


def read_all(folder: str | os.PathLike[str], probes: Sequence[Probe]) -> dict[str, Dumps]:
    """The dumps in a folder with a sub-folder for each probe; "dumps.toml" in the folder declares all of them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of dumps at {folder}")
    shared = next((p for name in ("dumps.toml", "dumps.json") if (p := folder / name).is_file()), None)
    found = {}
    for probe in probes:
        if (own := folder / probe.name).is_dir():
            beside = any((own / name).is_file() for name in ("dumps.toml", "dumps.json"))
            found[probe.name] = read_dumps(own, None if beside else shared)
    return found


def sift_all(questions: Sequence[Question], *, patience: int = 1) -> list[Sifted]:
    """The questions put to the worlds of each value of a switch."""
    asked = dict.fromkeys(field for question in questions for field in question.asks)
    values = domains()
    switches = [field for field in SWITCHES if field in asked]
    found = []
    for chosen in product(*(values[field] for field in switches)):
        given = dict(zip(switches, chosen, strict=True))
        worlds = Worlds({field: values[field] for field in asked if field not in given})
        found.append(sift(worlds, questions, given, patience=patience))
    return found


def _assembled(
    alive: Sequence[Sifted] | Sequence[Searched],
    branches: Sequence[Sifted] | Sequence[Searched],
    odd: Sequence[Suspect],
    problems: tuple[str, ...],
    base: Target,
    held: Sequence[str] = (),
) -> Fit:
    unnamed = {s.where for s in odd if s.kind == "unexplained"}
    broken = [q for q in alive[0].unexplained if q.where in unnamed]
    contradicted = {field for question in broken for field in question.asks}
    found = {}
    for field in fields():
        if field not in LIMITS:
            found[field] = _field(field, alive, branches, field in contradicted)
            if field in held and found[field].state != "not asked":
                found[field] = FieldFit(field, "held", found[field].values)
    target = _valid(base, _nearest(alive, base), found)
    cases = tuple(case_of(question, alive[0]) for question in alive[0].unexplained)
    return Fit(found, target, base, tuple(odd), cases, problems, tuple(alive))


def _field(
    field: str,
    alive: Sequence[Sifted] | Sequence[Searched],
    branches: Sequence[Sifted] | Sequence[Searched],
    contradicted: bool,
) -> FieldFit:
    left = [values for branch in alive if (values := branch.values(field))]
    if not left:
        return FieldFit(field, "not asked", ())
    values = tuple(v for v in domains()[field] if any(v in each for each in left))
    evidence = tuple(e for v in domains()[field] if v not in values and (e := _evidence(field, v, branches)))
    late = tuple(dict.fromkeys(q.where[0] for branch in alive for q in branch.postponed if field in q.asks))
    state: State = "contradicted" if contradicted else "decided" if len(values) == 1 else "undecided"
    return FieldFit(field, state, values, evidence, () if state == "decided" else late)


def _evidence(field: str, value: Any, branches: Sequence[Sifted] | Sequence[Searched]) -> Exclusion | None:
    """Why no branch has a value: what the last one says that had it."""
    own = [e for branch in branches if (e := branch.exclusions.get((field, value)))]
    dead = [
        branch
        for branch in branches
        if isinstance(branch, Sifted) and branch.given.get(field) == value and branch.unexplained
    ]
    return own[-1] if own else dead[0].dead_end(value) if dead else None


def _valid(base: Target, values: dict[str, Any], found: Mapping[str, FieldFit], kept: str = "") -> Target:
    """The march of these values. Where fields that no dump tied together do not go together, others of those left."""
    loose = [f for f in ("tables.fraction_bits", "tables.entries", "resize.weight_bits") if f in values and f != kept]
    choices = [[values[f], *(v for v in reversed(found[f].values) if v != values[f])] for f in loose]
    reason = QConfigError("no values are left")
    for chosen in product(*choices):
        try:
            return base.with_fields({**values, **dict(zip(loose, chosen, strict=True))})
        except QConfigError as error:
            reason = error
    raise reason


def _nearest(alive: Sequence[Sifted] | Sequence[Searched], base: Target) -> dict[str, Any]:
    """Of all that explain the dumps, the values nearest to a march."""
    worlds = [world for branch in alive if (world := branch.world(_wanted(base)))]
    return _most_of(worlds, base)


def _wanted(base: Target) -> dict[str, Any]:
    return {field: value_of(base, field) for field in domains()}


def _most_of(worlds: Sequence[dict[str, Any]], base: Target) -> dict[str, Any]:
    """The world with the most values of a march."""
    return max(worlds, key=lambda world: sum(value_of(base, field) == value for field, value in world.items()))
