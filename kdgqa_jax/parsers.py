"""Parsers of the command line: errors of one sentence, help that fits one screen."""

import argparse
from typing import NoReturn

from kdgqa_jax.errors import UserError, one_line


class WrongFlagsError(UserError):
    """Flags that a command does not have or values that they do not take."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise `WrongFlagsError`."""
        text = one_line(message, None)
        raise WrongFlagsError(f"{self.prog}: {text}; {self.prog} --help shows the flags")


class Help(argparse.HelpFormatter):
    """Help on one screen: wide flags beside their texts, defaults where there are any."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return action.help if silent else f"{action.help} (default: %(default)s)"


def usage(parser: argparse.ArgumentParser) -> str:
    """The usage line of a command: what it needs."""
    needed = [a for a in parser._actions if a.required]
    shown = [_shown(a) if a.option_strings else "{" + ",".join(a.choices) + "}" for a in needed]
    either = [
        "(" + " | ".join(map(_shown, group._group_actions)) + ")"
        for group in parser._mutually_exclusive_groups
        if group.required
    ]
    return " ".join([parser.prog, *either, *shown, "[options]"])


def _shown(flag: argparse.Action) -> str:
    return f"{flag.option_strings[0]} {flag.metavar or flag.dest.upper()}"
