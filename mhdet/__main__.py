from mhdet.cli.commands import app

app()
