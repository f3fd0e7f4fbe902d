"""The command line, installed as `perdure`.

Data goes to stdout, everything else to stderr. `main` puts the commands together; a room holds the
commands of one kind and has a `register(app)`. Nothing here imports the engine, SQLAlchemy or rich
at its top level: `perdure --help` answers at once.
"""
