"""`cook serve`, and the commands that use a server: submit, jobs, watch, logs, stop, resume, get, gc."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cook.base.errors import EXIT_FAILED, UserError
from cook.commands.options import AsJson

if TYPE_CHECKING:
    from cook.service.client import Client

Address = Annotated[
    str | None,
    typer.Option("--server", metavar="URL", help="The server. Default: `COOK_SERVER`, or the one on this machine."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="A file with the token. Default: `COOK_TOKEN`, or the server's own file."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="A job, as `cook jobs` lists it.")]
NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "jinja2", "httpx")
GIB = 2**30


def serve(
    home: Annotated[
        Path | None, typer.Option(help="Folder of the jobs. Default: `COOK_HOME`, or `~/.local/share/cook`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port. 0: a free one.")] = 8642,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with models, corpora and tokenizers that jobs may read; may be repeated."),
    ] = None,
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="Let jobs download data sets from the Hub.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM), for other addresses.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of the certificate (PEM).")] = None,
    behind_proxy: Annotated[
        bool, typer.Option("--behind-proxy", help="A proxy in front of the server adds TLS; see --allow-host.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name in the address bar of browsers; may be repeated."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="Index of jobs, such as postgresql+psycopg://… Default: SQLite.")
    ] = None,
    max_jobs: Annotated[int, typer.Option(min=1, help="Jobs per token that wait or run.")] = 1000,
    max_streams: Annotated[int, typer.Option(min=1, help="Open event streams per token.")] = 32,
    min_free: Annotated[float, typer.Option(min=0, help="No job is accepted with fewer free GiB on the disk.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Start the compression service: it accepts jobs, runs them, and shows them in a browser.

    Jobs are processes of their own. They continue when the server stops, and the next server finds them again.
    """
    _need_extra()
    from cook.service.api import Limits
    from cook.service.client import default_home
    from cook.service.server import Options, Server

    limits = Limits(jobs=max_jobs, streams=max_streams, free_bytes=round(min_free * GIB))
    options = Options(
        home=(home or default_home()).absolute(),
        host=host,
        port=port,
        roots=root or (),
        allow_hub=allow_hub,
        tls_cert=tls_cert,
        tls_key=tls_key,
        behind_proxy=behind_proxy,
        allow_hosts=allow_host or (),
        database=database,
        limits=limits,
    )
    server = Server(options)
    link, folders = server.login_link, [str(folder) for folder in server.service.roots.folders]
    with server.attached():
        if as_json:
            facts = {"url": server.url, "login": link, "home": str(options.home), "roots": folders}
            print(json.dumps(facts), flush=True)
        else:
            print(f"cook is served at {server.url}\n  log in:  {link}  (works once)\n  home:    {options.home}")
            print(f"  inputs:  {', '.join(folders) or 'none: name folders with --root'}", flush=True)
        server.serve_here()


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The path of a `bmcook.json`.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for people. Default: that of the recipe's folder.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs; each has one process. 0: the CPU.")] = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes on the CPU. Default: 1.")] = None,
    executor: Annotated[str, typer.Option(metavar="local|slurm", help="Where the job runs.")] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of sbatch, such as `partition=gpu`; may be repeated."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Jobs with a higher number start first.")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="Restarts after a lost rank or an interruption.")] = 2,
    stop_grace: Annotated[float, typer.Option(min=1, help="Seconds that a stopped job has to save.")] = 600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")] = False,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it ends.")] = False,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Submit a recipe as a job. The server checks it first, and reports all mistakes at once."""
    with _client(server, token_file) as client:
        from cook.service.bundle import bundle
        from cook.service.client import new_key

        body = bundle(config, set or [], here=client.is_here)
        body |= {"name": name if name is not None else config.absolute().parent.name, "gpus": gpus}
        body |= {"executor": executor, "priority": priority, "retries": retries, "stop_grace": stop_grace}
        body |= {"processes": processes, "slurm": _pairs(slurm or [])}
        if dry_run:
            plan = client.plan(body)
            _print_plan(plan) if not as_json else print(json.dumps(plan))
            return
        job = client.submit(body, new_key(body))
        if as_json:
            print(json.dumps(job), flush=True)
        else:
            print(f"job {job['id']} is {job['state']}: {client.url}{job['links']['page']}", flush=True)
        if follow:
            _watch(client, job["id"], as_json=as_json)


def jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only jobs of this owner.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many.")] = 50,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with _client(server, token_file) as client:
        found = list(client.jobs(state=state or (), owner=owner, limit=limit))
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'id':12}  {'state':9}  {'created':16}  {'where':9}  name")
    for job in found:
        where = f"{job['gpus']} GPU" if job["gpus"] else f"{job['processes']} CPU"
        created = job["created"][:16].replace("T", " ")
        print(f"{job['id']:12}  {job['state']:9}  {created:16}  {where:9}  {job['name']}  {job['message']}".rstrip())


def watch(id: Id, server: Address = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Watch a job until it ends: its state, its numbers and what it prints. Ctrl-C leaves it running.

    The exit code is 0 if the job has succeeded, else 1.
    """
    with _client(server, token_file) as client:
        client.job(id)
        _watch(client, id, as_json=as_json)


def logs(
    id: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Continue until the job ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="An attempt. Default: the newest.")] = None,
    tail: Annotated[int | None, typer.Option(min=0, metavar="BYTES", help="Begin this far from the end.")] = None,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Print what a job has printed."""
    with _client(server, token_file) as client, _detaching(f"cook logs -f {id}", as_json):
        offset, number = -(tail or 0), attempt
        while True:
            ended = client.job(id)["state"] in _ended()
            text, following, number = client.log(id, offset, number)
            if text and as_json:
                print(json.dumps({"attempt": number, "next_offset": following, "text": text}), flush=True)
            elif text:
                sys.stdout.write(text)
                sys.stdout.flush()
            offset = following
            if text:
                continue
            newest = client.job(id)["attempt"] if attempt is None else number
            if newest != number:
                number, offset = newest, 0
            elif ended or not follow:
                return
            else:
                time.sleep(1)


def stop(
    id: Id,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job. It saves a checkpoint first, from which `cook resume` continues."""
    with _client(server, token_file) as client:
        _print_state(client.stop(id, now=now), as_json)


def resume(id: Id, server: Address = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Queue a job again that was stopped, failed or lost; it continues from its last checkpoint."""
    with _client(server, token_file) as client:
        _print_state(client.resume(id), as_json)


def get(
    id: Id,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to download to.")],
    only: Annotated[
        list[str] | None, typer.Option(metavar="PREFIX", help="Only files whose names begin so; may be repeated.")
    ] = None,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Download the results of a job. Files are checked, and repeated after an interruption it continues."""
    with _client(server, token_file) as client:
        listed = client.artifacts(id)
        if not listed:
            state = client.job(id)["state"]
            raise UserError(f"job {id} has no results", wanted="a job that has succeeded", got=state)
        chosen = [entry for entry in listed if not only or entry["name"].startswith(tuple(only))]
        if not chosen:
            raise UserError("no file has this name", wanted=", ".join(entry["name"] for entry in listed))
        for entry in chosen:
            is_new = client.download(id, entry, folder, lambda text: print(text, file=sys.stderr))
            if not as_json:
                note = "" if is_new else "  (was there)"
                print(f"{folder / entry['name']}  {entry['bytes']:,} bytes{note}", flush=True)
    if as_json:
        print(json.dumps(chosen))


def gc(
    days: Annotated[float, typer.Option(min=0, help="Remove jobs that ended more than this many days ago.")] = 30.0,
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
    server: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Remove old jobs that have ended, with all of their files on the server."""
    if unknown := sorted(name for name in state or () if name not in _ended()):
        raise UserError(f"--state {unknown[0]}: such jobs cannot be removed", wanted=" or ".join(_ended()))
    before = datetime.now(UTC) - timedelta(days=days)
    with _client(server, token_file) as client:
        candidates = list(client.jobs(state=state or _ended()))
        old = [job for job in candidates if datetime.fromisoformat(job["ended"] or job["created"]) < before]
        for job in old:
            if not dry_run:
                client.remove(job["id"])
            if not as_json:
                done = "would remove" if dry_run else "removed"
                print(f"{done} {job['id']}  {job['state']:9}  {job['name']}", flush=True)
    if as_json:
        print(json.dumps(old))


COMMANDS = (serve, submit, jobs, watch, logs, stop, resume, get, gc)


def _need_extra() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the service needs {', '.join(missing)}", remedy="pip install 'cook[serve]'")


@contextmanager
def _client(server: str | None, token_file: Path | None) -> Iterator[Client]:
    _need_extra()
    from cook.service.client import Client, find_server

    with Client(*find_server(server, token_file)) as client:
        yield client


@contextmanager
def _detaching(again: str, as_json: bool) -> Iterator[None]:
    """Ctrl-C ends the command and not the job."""
    try:
        yield
    except KeyboardInterrupt:
        if not as_json:
            print(f"\ndetached; the job continues. To attach again: {again}")


def _watch(client: Client, id: str, *, as_json: bool) -> None:
    code = 0
    with _detaching(f"cook watch {id}", as_json):
        end: dict[str, Any] | None = None
        for name, data in client.events(id):
            if name == "job" and data["state"] in _ended():
                end = data  # shown last: the stream has the rest of the files first
            elif name != "ready":
                print(json.dumps({"event": name, **data}), flush=True) if as_json else _show(name, data)
            elif end is not None:
                break
        if end is not None:
            print(json.dumps({"event": "job", **end}), flush=True) if as_json else _show("job", end)
            code = 0 if end["state"] == "succeeded" else EXIT_FAILED
    if code:
        raise typer.Exit(code)


def _show(name: str, data: dict[str, Any]) -> None:
    if name == "job":
        attempt = f", attempt {data['attempt']}" if data["attempt"] else ""
        print(f"-- {data['state']}{attempt}  {data['message']}".rstrip())
    elif name == "log":
        sys.stdout.write(data["text"])
    elif name == "reset":
        print(f"-- {data['stage']}")
    sys.stdout.flush()


def _print_state(job: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(job) if as_json else f"job {job['id']} is {job['state']}  {job['message']}".rstrip())


def _print_plan(plan: dict[str, Any]) -> None:
    from cook.recipe.dry_run import show_plan

    show_plan(plan)


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise UserError(f"--slurm {text}: not an option", wanted="KEY=VALUE")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def _ended() -> tuple[str, ...]:
    from cook.service.client import ENDED

    return ENDED
