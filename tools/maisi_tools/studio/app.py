"""The studio's HTTP: the page, and what it and programs call."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import shutil
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import nibabel as nib
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

from maisi_tools import report
from maisi_tools.errors import InputError
from maisi_tools.files import parse_json, write_json
from maisi_tools.masks.label_maps import LABEL_MAPS, read_label_map
from maisi_tools.settings import check_plain
from maisi_tools.studio import nvidia, results, uploads
from maisi_tools.studio.catalogue import CONTROLNET, SMALL, WAITING, Catalogue, has_dicom
from maisi_tools.studio.folders import DISK_FULL, Folders
from maisi_tools.studio.guard import Guard
from maisi_tools.studio.jobs import FINAL, Full, Job, Jobs, Worker
from maisi_tools.studio.planner import Planner
from maisi_tools.studio.recipe import name_of, result_of
from maisi_tools.studio.requests import Grid, check_memory_limit, check_request, check_triple, grid_of
from maisi_tools.tsp.plan import format_bytes
from maisi_tools.volumes.limits import check_limit

LARGEST_BODY = 1 << 20
"""Bytes of a request that is no upload."""

Result = TypeVar("Result")

KEEP_ALIVE = 15.0
"""Seconds after which a comment is sent to who waits for news, so that no one in between closes the connection."""

STILL_THERE = 1.0
"""Seconds after which it is looked anew whether a client is there that waits for samples."""

UPLOAD_ID_BYTES = 8
"""An upload's id, and folder, has two digits for each; other folders beside them are the user's own."""

EXAMPLE = {
    "makes": "ct",
    "source": {"kind": "generator", "organ_sizes": {"left parotid": 40}},
    "edits": [{"insert": {"bone lesion": 20}, "seed": 3}],
    "settings": {"seed": 7, "num_inference_steps": 10},
}


def serve(
    folders: Folders,
    workers: Sequence[Worker],
    listening: socket.socket,
    host: str,
    token: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    browse: bool = True,
) -> None:
    """Serve until a signal ends it.

    Args:
        folders: of the studio, held by this process.
        workers: one a device.
        listening: bound to an address.
        host: that address.
        token: that every request needs, None for none.
        certificate, key: PEM files, for TLS.
        browse: whether a browser is opened.

    Raises:
        InputError: the certificate cannot be loaded.
    """
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # "logging file is set to False", to stdout
    app = make_app(folders, workers)
    guarded = Guard(app, host, token, certificate is not None)
    config = uvicorn.Config(guarded, log_level="warning", server_header=False, timeout_graceful_shutdown=2)
    config.ssl_certfile, config.ssl_keyfile = certificate, key
    try:
        config.load()
    except OSError as error:
        raise InputError(f"the certificate {certificate} cannot be loaded ({error}); give PEM files") from error
    # Of all addresses of this machine its name is what others know.
    named = socket.gethostname() if host in ("0.0.0.0", "::") else host
    place = f"[{named}]" if ":" in named else named
    address = f"{'https' if certificate else 'http'}://{place}:{listening.getsockname()[1]}/"
    address += f"?token={quote(token)}" if token else ""
    print(f"MAISI Studio: {address}", flush=True)
    if browse and not token:  # a browser's arguments are seen by all who use this machine
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def make_app(folders: Folders, workers: Sequence[Worker]) -> FastAPI:
    """The application; docs/how-to/studio.md lists what it answers."""
    catalogue = Catalogue(folders, [worker.device for worker in workers])
    page = Path(str(resources.files(__package__).joinpath("page")))
    for folder in (folders.root / "uploads").glob("[0-9a-f]" * (2 * UPLOAD_ID_BYTES)):
        if not (folder / "upload.json").is_file():  # what a killed server had not read to its end
            shutil.rmtree(folder, ignore_errors=True)
    jobs = Jobs(folders, workers, WAITING)
    planner = Planner(folders.bundles)
    reading, planning = asyncio.Lock(), asyncio.Lock()

    async def alone(read: Callable[..., Result], *args: Any) -> Result:
        """What `read` returns; one at a time, so that memory holds one volume, however many clients ask."""
        async with reading:
            return await run_in_threadpool(read, *args)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        planner.close()
        jobs.close()

    app = FastAPI(
        title="MAISI Studio", version=version("maisi-bundles"), docs_url=None, redoc_url=None, lifespan=lifespan
    )

    # --- errors in plain words ----------------------------------------------------------------------------------------

    @app.exception_handler(InputError)
    async def wrong(_: Request, error: InputError) -> Response:
        words = str(error).encode(errors="backslashreplace").decode()  # JSON may bring halves of characters
        return JSONResponse({"detail": words}, 422)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": words}, 422)

    @app.exception_handler(Full)
    async def full(_: Request, __: Full) -> Response:
        return JSONResponse({"detail": f"{WAITING} jobs wait already; wait for some of them, or cancel them"}, 429)

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> Response:
        if error.errno not in DISK_FULL:
            return JSONResponse({"detail": f"a file cannot be read or written ({error})"}, 500)
        words = f"the studio's folder {folders.root} cannot be written ({error.strerror})"
        return JSONResponse({"detail": f"{words}; make room on its disk, or start with another --output_dir"}, 507)

    @app.exception_handler(MemoryError)
    async def no_memory(_: Request, __: MemoryError) -> Response:
        words = "the volume is too large for this machine's memory; crop it, or resample it to a coarser spacing"
        return JSONResponse({"detail": words}, 413)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # which nobody is there to read

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        words = f"the server has a fault ({type(error).__name__}: {error}); its terminal has the details"
        return JSONResponse({"detail": words}, 500)

    # --- what there is ------------------------------------------------------------------------------------------------

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return FileResponse(page / "index.html")

    @app.get("/static/viewer.{kind}", include_in_schema=False)
    def viewer(kind: Literal["js", "css"]) -> Response:
        """The report's viewer, which the page shows volumes with."""
        return FileResponse(str(resources.files(report).joinpath(f"viewer.{kind}")))

    app.mount("/static", StaticFiles(directory=page, check_dir=False))

    @app.get("/v1/health/live")
    async def live() -> dict[str, str]:
        """The server runs."""
        return {"status": "live"}

    @app.get("/v1/health/ready")
    async def ready() -> Response:
        """Every worker could take a job, or works on one."""
        return JSONResponse({"status": "ready"}) if jobs.ready else JSONResponse({"status": "starting"}, 503)

    @app.get("/v1/options")
    def options() -> dict[str, Any]:
        """What can be asked for."""
        return catalogue.options()

    @app.post("/v1/plan", openapi_extra=_body({"size": [96, 80, 96], "spacing": [4, 4, 2.5], "memory_limit": "1GiB"}))
    async def plan(request: Request) -> dict[str, Any]:
        """What making a CT of a size, or of a job's source, needs of a device's memory."""
        content = await _content(request)
        size, asked = await run_in_threadpool(_to_plan, content, catalogue, mask_grid)
        if (stages := planner.known(asked)) is None:
            async with planning:  # the cost of one is large enough
                stages = await run_in_threadpool(planner.plan, asked)
        return _planned(size, stages)

    # --- uploads ------------------------------------------------------------------------------------------------------

    @app.post("/v1/uploads", status_code=201, openapi_extra=_body(None))
    async def upload(request: Request, name: str = Query(), kind: str = Query()) -> dict[str, Any]:
        """A mask or a CT; the body is the file. Its name is a label; only the suffix says how it is read."""
        file = f"{'scan' if kind == 'ct' else 'mask'}{uploads.suffix_of(name, kind)}"
        folder = folders.root / "uploads" / secrets.token_hex(UPLOAD_ID_BYTES)
        try:
            folder.mkdir(parents=True)
            await _receive(request, folder / file, catalogue.upload_bytes)
            return await alone(uploads.describe_upload, folder, file, name, kind)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @app.get("/v1/uploads/{id}")
    def uploaded(id: str) -> dict[str, Any]:
        """What is known of an upload."""
        return _found(folders.upload, id)

    @app.get("/v1/uploads/{id}/labels")
    def labels(id: str, label_map: str = Query()) -> list[dict[str, Any]]:
        """The labels of a mask, each with what a label map takes it for."""
        known = _found(folders.upload, id)
        if known["kind"] != "mask":
            raise InputError(f"upload {id} is a CT, which has no labels")
        return uploads.readings(known, read_label_map(folders.label_map(label_map)))

    @app.post("/v1/label_maps", status_code=201, openapi_extra=_body({"name": "ours", "labels": {"7": "liver"}}))
    async def save_label_map(request: Request) -> dict[str, str]:
        """Save how the labels of a file are to be read."""
        content = await _content(request)
        if not isinstance(content, dict) or set(content) != {"name", "labels"}:
            raise InputError("a label map is {name, labels}; give both, and nothing else")
        path = folders.new_label_map(content["name"])
        if content["name"] in LABEL_MAPS:
            raise InputError(f"{content['name']} is the name of a label map that is there; give another one")
        labels = uploads.checked_labels(content["labels"])
        if _says_otherwise(path, labels):  # a job that waits would be made of what it was not asked for
            raise HTTPException(409, f"the label map {path.stem} says something else; give this one another name")
        write_json(path, labels)
        return {"name": path.stem}

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def mask_grid(id: Any) -> Grid:
        try:
            job = jobs[id]
            mask = volumes_of(job)["mask"] if job.state == "done" else None
        except (KeyError, TypeError):
            mask = None
        if mask is None:
            raise InputError(f"there is no job {id!r} with a mask; wait until it is done, or name another one")
        image: Any = nib.as_closest_canonical(nib.load(mask))
        return list(image.shape), [round(float(mm), 6) for mm in image.header.get_zooms()]

    def add(content: Any) -> Job:
        request = check_request(content, catalogue, mask_grid)
        weights = catalogue.weights[request["settings"].get("weights", SMALL)]
        return jobs.add(request, weights.overlays)

    def job_of(id: str) -> Job:
        return _found(jobs.__getitem__, id)

    def done_job(id: str) -> Job:
        if (job := job_of(id)).state != "done":
            raise HTTPException(409, f"job {id} is {job.state}; its files are there when it is done")
        return job

    def volumes_of(job: Job) -> dict[str, Path]:
        return result_of(vars(job), folders)

    def shown(job: Job) -> dict[str, Any]:
        folder = folders.job(job.id)
        # The scan before an edit is the upload's, which may have been removed.
        volumes = [what for what in job.volumes if what != "before" or what in volumes_of(job)]
        files = results.files_of(folder) if job.state == "done" else []
        return {
            **{name: value for name, value in vars(job).items() if name not in ("overlays", "attempts")},
            "makes": job.request["makes"],
            "volumes": volumes,
            "position": jobs.position(job),
            "files": [{"name": file.name, "bytes": file.stat().st_size, "type": _type_of(file)} for file in files],
            "dicom": bool(files) and has_dicom() and results.without_dicom(folder, job.volumes, job.request) is None,
        }

    @app.post("/v1/jobs", status_code=202, openapi_extra=_body(EXAMPLE))
    async def post_job(request: Request) -> dict[str, Any]:
        """Queue a mask or a CT."""
        return shown(add(await _content(request)))

    @app.get("/v1/jobs")
    async def list_jobs() -> list[dict[str, Any]]:
        """All jobs, newest first."""
        return [shown(job) for job in jobs.newest_first()]

    @app.get("/v1/jobs/{id}")
    async def get_job(id: str) -> dict[str, Any]:
        """A job."""
        return shown(job_of(id))

    @app.delete("/v1/jobs/{id}")
    async def cancel_job(id: str) -> dict[str, Any]:
        """Cancel a job that waits or runs."""
        job = job_of(id)
        if job.state in FINAL:
            raise HTTPException(409, f"job {id} is {job.state}; only one that waits or runs can be cancelled")
        jobs.cancel(job)
        return shown(job)

    @app.get("/v1/jobs/{id}/events")
    async def events(id: str) -> Response:
        """Server-sent events: the job, now and at each change, until its final state."""
        job = job_of(id)

        async def lines() -> AsyncIterator[str]:
            async for changed in jobs.changes(job, KEEP_ALIVE):
                yield f"event: job\ndata: {json.dumps(shown(job))}\n\n" if changed else ": still here\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/v1/jobs/{id}/volumes/{what}")
    async def volume(id: str, what: str) -> Response:
        """The values of "ct", "mask" or "before", x fastest, in RAS; the header X-Volume says what they are."""
        found = volumes_of(done_job(id))
        if what not in found:
            raise HTTPException(404, f"job {id} has no {what}; it has {', '.join(found)}")
        header, content = await alone(results.raw, found[what], what)
        headers = {"X-Volume": json.dumps(header), "Content-Encoding": "gzip"}
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.get("/v1/jobs/{id}/files/{name}")
    def file(id: str, name: str) -> Response:
        """One of the job's files."""
        known = {path.name: path for path in results.files_of(folders.job(done_job(id).id))}
        if name not in known:
            raise HTTPException(404, f"job {id} has no file {name}; it has {', '.join(known)}")
        return FileResponse(known[name], filename=name)

    @app.get("/v1/jobs/{id}/picture.png")
    async def picture(id: str) -> Response:
        """Three planes of the CT with its mask."""
        job = done_job(id)
        return FileResponse(await _or_404(alone(results.picture, folders.job(id), volumes_of(job))))

    @app.get("/v1/jobs/{id}/dicom.zip")
    async def dicom(id: str) -> Response:
        """The CT as a DICOM series, with its mask as Segmentation and Structure Set."""
        job = done_job(id)
        if not has_dicom():
            raise HTTPException(404, "DICOM needs the extra 'dicom'; install it: pip install 'maisi-bundles[dicom]'")
        path = await _or_404(alone(results.dicom, folders.job(id), volumes_of(job), job.request, str(job.finished)))
        return FileResponse(path, filename=f"{name_of(vars(job), folders)}_dicom.zip")

    # --- NVIDIA's service ---------------------------------------------------------------------------------------------

    @app.get("/v1/maisi/info")
    def maisi_info() -> dict[str, Any]:
        """What :func:`maisi_run` can make."""
        return nvidia.info(catalogue)

    @app.get("/v1/license")
    def license() -> dict[str, str]:
        """The licences of the bundle and of its weights' data."""
        found = [folders.bundles / CONTROLNET / "LICENSE", *(folders.bundles / CONTROLNET / "docs").glob("*license*")]
        return {path.name: path.read_text() for path in found if path.is_file()}

    @app.post("/v1/maisi/run", openapi_extra=_body({"num_output_samples": 1, "body_region": ["head"]}))
    async def maisi_run(request: Request) -> Response:
        """CT and mask pairs, as a zip file, when all of them are made."""
        body, contents = nvidia.read_body(await _content(request), catalogue)
        made: list[Job] = []
        try:
            for content in contents:
                made.append(add(content))
            await _while_there(request, jobs.finished(made))
        except BaseException:  # the queue is full, the client left, or the server ends
            for job in made:
                if job.state not in FINAL:
                    jobs.cancel(job)
            raise
        if failed := [job for job in made if job.state != "done"]:
            raise HTTPException(500, f"job {failed[0].id} {failed[0].state}: {failed[0].error or 'before it was done'}")
        path = folders.job(made[0].id) / ".samples.zip"
        pairs = {job.id: volumes_of(job) for job in made}
        await alone(results.pairs, path, pairs, body.image_output_ext, body.label_output_ext)
        return FileResponse(path, filename="samples.zip", headers={"X-Jobs": ",".join(pairs)})

    return app


def _to_plan(
    content: Any, catalogue: Catalogue, mask_grid: Callable[[Any], Grid]
) -> tuple[Sequence[int], tuple[Any, ...]]:
    """The size of a CT that is to be planned, and what :meth:`Planner.plan` is asked for it."""
    known = ("source", "size", "spacing", "memory_limit", "weights", "device", "preset")
    if not isinstance(content, dict) or (unknown := sorted(set(content) - set(known))):
        raise InputError(f"the plan has {', '.join(unknown) if isinstance(content, dict) else content!r}; allowed are "
                         f"{', '.join(known)}")  # fmt: skip
    check_plain(content, "the plan")
    settings = {
        key: content[key] for key in ("spacing", "preset", "memory_limit", "weights", "device") if key in content
    }
    check_memory_limit(content.get("memory_limit"))
    if content.get("size") is not None:
        check_triple("size", content["size"], 1, 4096, whole=True)
    sized = content.get("size") is not None
    if sized and (beside := [key for key in ("source", "preset") if content.get(key) is not None]):
        raise InputError(f"the plan has size and {' and '.join(beside)}, which would change nothing; give one of them")
    source = {"kind": "phantom"} if sized else content.get("source")
    request = check_request({"makes": "ct", "source": source, "settings": settings}, catalogue, mask_grid)
    size = content["size"] if sized else grid_of(request, catalogue, mask_grid)[0]
    check_limit("MAISI_MAX_VOXELS", math.prod(size), f"a CT of {list(size)} has {math.prod(size)} voxels")
    given = request["settings"]
    weights = catalogue.weights[given["weights"]]
    padded = [-(-n // weights.multiple) * weights.multiple for n in size]
    return size, (weights.overlays, padded, given.get("memory_limit"), given["device"].split(":")[0])


def _planned(size: Sequence[int], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plan as it is answered."""
    stages = [{"name": one["stage"], "bytes": one["bytes"]} for one in found]
    peak = max((one["bytes"] for one in found if one["bytes"] is not None), default=0)
    refused = [one for one in found if one["bytes"] is None]
    shape = " x ".join(map(str, size))
    words = f"a CT of {shape} voxels needs {format_bytes(peak)} at its peak"
    if refused:
        words = f"a CT of {shape} voxels does not fit: {refused[0]['stage']}: {refused[0]['refusal']}"
    return {"size": list(size), "stages": stages, "peak_bytes": peak, "fits": not refused, "words": words}


async def _content(request: Request) -> Any:
    """The JSON of a request's body."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST_BODY:
            raise HTTPException(413, f"the request is larger than {LARGEST_BODY} bytes; files go to /v1/uploads")
    try:
        return parse_json(found)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the body is no JSON that can be read ({error}); allowed is an object with each key once: see "
            "/openapi.json"
        ) from None


async def _while_there(request: Request, waits: Coroutine[Any, Any, None]) -> None:
    """Wait for something as long as the client does.

    Raises:
        ClientDisconnect: it left.
    """
    waiting = asyncio.create_task(waits)
    try:
        while not (await asyncio.wait([waiting], timeout=STILL_THERE))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        await waiting
    finally:
        waiting.cancel()


async def _receive(request: Request, path: Path, most: int) -> None:
    """Write a body to a file, as it comes."""
    refusal = HTTPException(
        413,
        f"the file is larger than {most} bytes, the most that is taken; crop it, or set MAISI_MAX_FILE_BYTES higher",
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise refusal
    size = 0
    with open(path, "xb") as file:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise refusal
            await run_in_threadpool(file.write, part)
    if not size:
        raise InputError("the body is empty; send the file as it is, as the request's body")


def _says_otherwise(path: Path, content: Any) -> bool:
    """Whether there is a file, and it holds other JSON."""
    try:
        return json.loads(path.read_text()) != content
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def _found(find: Callable[[str], Any], id: str) -> Any:
    try:
        return find(id)
    except (KeyError, InputError):
        raise HTTPException(404, f"there is nothing with the id {id!r}") from None


async def _or_404(found: Awaitable[Path]) -> Path:
    try:
        return await found
    except InputError as error:
        raise HTTPException(404, str(error)) from None


def _type_of(file: Path) -> str:
    return {"gz": "NIfTI", "json": "JSON", "csv": "CSV"}.get(file.name.rsplit(".", 1)[-1], "file")


def _body(example: Any) -> dict[str, Any]:
    """What OpenAPI says of a body that is read and checked by hand."""
    if example is None:
        kind = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    else:
        kind = {"application/json": {"schema": {"type": "object", "example": example}}}  # type: ignore[dict-item]
    return {"requestBody": {"required": True, "content": kind}}
