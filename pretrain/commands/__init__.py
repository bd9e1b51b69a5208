"""One file per verb: `add_parser(subparsers)` and `run(args) -> int`; heavy imports inside `run`."""
