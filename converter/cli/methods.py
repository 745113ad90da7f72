"""The command ``gloss methods``: which methods there are."""

from dataclasses import asdict

from converter.cli.command import Answer, command, quiet_libraries


@command("methods")
def methods_command() -> Answer:
    """Print every method: its paper, and what it needs, changes and can be written as.

    Those of installed packages are among them. Each is looked at with its default options, on a
    small Llama; options of its own and another model can make a difference.
    """
    from converter.entrypoints.methods import describe_methods, table

    quiet_libraries()
    methods = describe_methods()
    return Answer([asdict(method) for method in methods], table(methods))
