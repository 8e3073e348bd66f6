"""Group of commands whose help is plain text, so that it needs no rich.

Importing rich would take as long as everything else that `perdure --help` does.
"""

from click import Context, Group, HelpFormatter, echo
from typer.core import TyperGroup

NO_COMMAND = 2
"""Exit code if no command was given, as click's."""


class CommandGroup(TyperGroup):
    """Group with plain help, and the whole first paragraph of each of its commands."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parse the words of the command line; without any, print the help and end with code 2."""
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            # typer expects that rich has printed the help already
            echo(ctx.get_help(), color=ctx.color)
            ctx.exit(NO_COMMAND)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the help of the group as click does."""
        Group.format_help(self, ctx, formatter)

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the list of commands; click would cut each at the end of its line."""
        named = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [
            (name, " ".join((command.help or "").split("\n\n")[0].split()))
            for name, command in named
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
