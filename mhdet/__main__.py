from mhdet.cli import app

app()
