"""What every command has: `--db` and `--json`, before or after its name, and the error boundary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from perdure.cli.exits import guarded
from perdure.cli.help import PlainCommand, PlainGroup
from perdure.cli.terminal import send_log_to_stderr
from perdure.errors import InvalidTask

if TYPE_CHECKING:
    from perdure.engine import Engine
    from perdure.settings import WorkerSettings
    from perdure.store.claims import Scope
    from perdure.store.database import Database

__all__ = ["DbOption", "JsonOption", "Session", "add_command", "add_group"]

_PANEL: Final = "Everywhere"

DbOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="FILE|URL",
        help="The database; default: PERDURE_DB, or one per user.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
JsonOption: TypeAlias = Annotated[
    bool,
    typer.Option("--json", help="Data as JSON, for programs.", rich_help_panel=_PANEL),
]

Outcome: TypeAlias = int | None
Command: TypeAlias = Callable[..., Outcome | Coroutine[Any, Any, Outcome]]


@dataclass(frozen=True, slots=True)
class Session:
    """The options that every command has.

    Attributes:
        db: The database that was named with `--db`, if one was.
        json: Whether data is wanted as JSON.
    """

    db: str | None = None
    json: bool = False

    @property
    def url(self) -> str:
        """The database to use: `--db`, else `PERDURE_DB`, else one per user."""
        if self.db is not None:
            return self.db
        from perdure.store.readonly import default_database

        return default_database()

    @property
    def shown_db(self) -> str:
        """What was named with `--db`, without a password, for people to read."""
        return "" if self.db is None else _shown(self.db)

    @property
    def shown_url(self) -> str:
        """The database to use, without a password."""
        return _shown(self.url)

    @property
    def file(self) -> Path | None:
        """The database's file; None where it is on a server."""
        from perdure.store.readonly import on_server, path_of

        return None if on_server(self.url) else path_of(self.url)

    def database(self) -> Database:
        """Return the database, not opened yet."""
        from perdure.store.database import Database

        return Database(self.url)

    def engine(
        self,
        *,
        run: bool = False,
        create: bool = False,
        scope: Scope | None = None,
        settings: WorkerSettings | None = None,
        default_platform: str | None = None,
    ) -> Engine:
        """Return an engine on the database, to be entered with ``async with``.

        Unlike `Engine.open` it runs nothing and creates nothing unless told to.
        """
        from perdure.engine import Engine

        return Engine.open(
            self.url,
            run=run,
            create=create,
            scope=scope,
            settings=settings,
            default_platform=default_platform,
        )

    def command_line(self, *arguments: str) -> str:
        """Return a perdure command on this database, for people to copy into their shell."""
        import shlex

        named = () if self.db is None else ("--db", self.shown_db)
        return shlex.join(("perdure", *arguments, *named))

    @property
    def same_command(self) -> str:
        """This command once more, without a password, for people to copy into their shell."""
        import shlex
        import sys

        given = sys.argv[1:]
        if self.db:
            given = [one.replace(self.db, self.shown_db) for one in given]
        return shlex.join(("perdure", *given))


def _shown(database: str) -> str:
    from perdure.store.readonly import on_server

    if not on_server(database):
        return database
    from perdure.store.database import parse_url, shown_url

    return shown_url(parse_url(database).set(drivername="postgresql"))


def add_command(
    app: typer.Typer, function: Command, *, name: str, panel: str | None = None
) -> None:
    """Make ``function`` a command of ``app``.

    Its first parameter gets the `Session`, the others are typer's; one whose type is a dataclass
    stands for all of its fields, so that commands can share options. It may be a coroutine
    function. It returns an exit code, or None for 0; what it raises becomes one line on stderr.

    Args:
        app: The whole program, or a group of commands.
        function: What the command does; its docstring is the help.
        name: The command's name.
        panel: The heading in the help under which it stands.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    bundles = {p.name: _fields(p.annotation) for p in own if is_dataclass(p.annotation)}

    def command(**given: Any) -> None:  # noqa: ANN401 - what typer has parsed
        context: typer.Context = given.pop("context")
        session = _session(context, given.pop("db"), given.pop("as_json"))
        for name, (make, fields) in bundles.items():
            given[name] = make(**{field.name: given.pop(field.name) for field in fields})
        send_log_to_stderr()
        code = guarded(lambda: _carry_out(function, session, given))
        raise typer.Exit(code)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = (
        inspect.Parameter("context", keyword, annotation=typer.Context),
        inspect.Parameter("db", keyword, default=None, annotation=DbOption),
        inspect.Parameter("as_json", keyword, default=False, annotation=JsonOption),
    )
    parameters = [
        shown.replace(kind=keyword)
        for parameter in own
        for shown in (bundles[parameter.name][1] if parameter.name in bundles else (parameter,))
    ]
    signature = inspect.Signature([added[0], *parameters, *added[1:]])
    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    command.__dict__["__signature__"] = signature
    app.command(name, cls=PlainCommand, rich_help_panel=panel)(command)


def _fields(bundle: Any) -> tuple[Callable[..., Any], Sequence[inspect.Parameter]]:  # noqa: ANN401
    """Return how a bundle of options is made, and the parameters that it stands for."""
    parameters = inspect.signature(bundle, eval_str=True).parameters
    return bundle, tuple(parameters.values())


def add_group(app: typer.Typer, *, name: str, about: str, panel: str | None = None) -> typer.Typer:
    """Return a group of commands, such as `perdure db …`, for `add_command`.

    Args:
        app: The whole program.
        name: The group's name.
        about: Its help.
        panel: The heading in the program's help under which it stands.
    """
    group = typer.Typer(cls=PlainGroup, rich_markup_mode=None, help=about, no_args_is_help=True)
    app.add_typer(group, name=name, rich_help_panel=panel)
    return group


def _session(context: typer.Context, db: str | None, as_json: bool) -> Session:
    """Join what was given before the command's name and after it; the latter counts."""
    before = context.obj if isinstance(context.obj, Session) else Session()
    return Session(db=before.db if db is None else db, json=before.json or as_json)


def _carry_out(function: Command, session: Session, given: dict[str, Any]) -> Outcome:
    if session.db is not None and not session.db.strip():
        raise InvalidTask("--db: give a file's path or a URL")
    outcome = function(session, **given)
    if not isinstance(outcome, Coroutine):
        return outcome
    import asyncio

    return asyncio.run(outcome)
