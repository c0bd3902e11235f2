"""A board: `board check`, `board probe`, `board fit`."""

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from jquant.cli.arguments import check_file, check_folder, check_picture
from jquant.cli.console import Console, Json, Quiet, UnmetError, UsageError, Verbose, command, plain, replacing
from jquant.cli.models import load_model
from jquant.targets import find_target
from jquant.types import Program

board = typer.Typer(name="board", no_args_is_help=True, rich_markup_mode=None)

DumpsFolder = Annotated[Path, typer.Argument(metavar="DUMPS", help="A folder with a file for each value.")]
Declared = Annotated[
    Path | None,
    typer.Option("--declaration", help="TOML or JSON: names, layouts and dtypes of the files; or dumps.toml in DUMPS."),
]
Family = Annotated[
    list[str] | None, typer.Option("--family", help="rescale, layers, tables, resize or grid; once for each.")
]


@board.callback()
def _root() -> None:
    """Compare a program with the dumps of a board, and fit a march to a board.

    \b
    jquant board check net.jq dumps/
    jquant board probe -o probes/
    jquant board fit dumps/ -o mine.toml
    jquant board fit net.jq dumps_of_net/ -o mine.toml
    """


@board.command()
@command
def check(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A program of this tool (.jq).")],
    dumps: DumpsFolder,
    declaration: Declared = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write all numbers as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also write a picture (.png).")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compare a program with a board's dumps, each node alone on the board's operands. Exit code 3 if one differs.

    \b
    jquant board check net.jq dumps/ --declaration dumps.toml --picture seen.png
    """
    from jquant.board import compare, read_dumps

    console = Console(json, quiet, verbose)
    check_file(output)
    check_picture(picture, "--picture", (".png",))
    found = load_model(program)
    if not isinstance(found, Program):
        raise UsageError(f"{program} is no program; make one with jquant quantize")
    comparison = compare(found, read_dumps(dumps, declaration, names=found.graph.values))
    console.text(comparison.table())
    if output is not None:
        with replacing(output) as partial:
            partial.write_text(json_text.dumps(plain(comparison.to_dict()), indent=1))
        console.wrote(output)
    if picture is not None:
        with replacing(picture) as partial:
            partial.write_bytes(comparison.picture())
        console.wrote(picture)
    console.value(comparison.to_dict())
    if not comparison.is_equal:
        first = comparison.first
        what = f"{first.name} is the first node that differs" if first else "no node differs, but files have problems"
        raise UnmetError(f"the dumps are not those of the program: {what}")
    console.text("every node that was dumped is equal")


@board.command()
@command
def probe(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write into.")],
    family: Family = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write small nets with inputs that tell how a board rounds, shifts and saturates, and what to dump of them.

    \b
    jquant board probe -o probes/
    """
    from jquant import board as jq_board
    from jquant_converters import write_probes

    console = Console(json, quiet, verbose)
    check_folder(output)
    probes = jq_board.probe(family or list(jq_board.FAMILIES))
    readme = write_probes(output, probes)
    separations = jq_board.separation(probes)
    rows = [
        {"field": s.field, "pairs": len(s.counts), "told apart": len(s.counts) - len(s.alike), "fewest": s.fewest}
        for s in separations.values()
    ]
    console.rows(rows)
    console.wrote(readme)
    console.next("board", "fit", "DUMPS", "-o", "mine.toml")
    console.value({"output": output, "probes": [made.name for made in probes], "separation": rows})


@board.command()
@command
def fit(
    source: Annotated[
        str,
        typer.Argument(metavar="DUMPS|MODEL", help="Dumps of the probes, a folder each; or a network (.jqs, .jq)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The march to write (.toml).")],
    dumps: Annotated[
        Path | None,
        typer.Argument(metavar="[DUMPS]", help="The dumps of the network: a folder with a file for each value."),
    ] = None,
    family: Family = None,
    base: Annotated[
        str | None,
        typer.Option(help="The march whose values stand where the dumps decide nothing; the network's own, or nash-e."),
    ] = None,
    held: Annotated[
        list[str] | None,
        typer.Option(help="With a network: a field, or rescale.max_*, whose value in the base is the board's."),
    ] = None,
    declaration: Declared = None,
    report: Annotated[Path | None, typer.Option(help="Also write fields, evidence and cases as JSON.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fit a march to a board's dumps of probes, or of a network. Exit code 3 if a dump is left that no march explains.

    \b
    jquant board fit dumps/ -o mine.toml --report fit.json
    jquant board fit net.jqs dumps_of_net/ -o mine.toml --held "rescale.max_*"
    """
    from jquant import board as jq_board

    console = Console(json, quiet, verbose)
    check_file(output)
    check_file(report, "--report")
    march = None if base is None else find_target(base)
    if dumps is None:
        if held or declaration is not None:
            raise UsageError("--held and --declaration belong to a network: jquant board fit MODEL DUMPS -o MARCH")
        found = jq_board.fit(jq_board.probe(family or list(jq_board.FAMILIES)), source, base=march)
    else:
        if family:
            raise UsageError("--family chooses probes; with a network there are none")
        loaded = load_model(source)
        network = loaded if isinstance(loaded, Program) else loaded.calibrated()
        graph = network.graph if isinstance(network, Program) else network.plan.graph
        values = jq_board.read_dumps(dumps, declaration, names=graph.values)
        found = jq_board.fit(network, values, base=march, held=held or ())
    console.text(found.table())
    found.dump(output, output.stem)
    console.wrote(output)
    if report is not None:
        with replacing(report) as partial:
            partial.write_text(json_text.dumps(plain(found.to_dict()), indent=1))
        console.wrote(report)
    console.value(found.to_dict())
    if found.suspects:
        raise UnmetError(f"{len(found.suspects)} dumps are explained by no march; the first: {found.suspects[0]}")
    console.next("init", "--march", output, "-o", "q.toml")
