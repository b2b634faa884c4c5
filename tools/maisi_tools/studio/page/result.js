// What a job has made: planes, 3D view, structures, files, command.
/* global Viewer */ // of viewer.js
import { $, all, announce, element, fromTemplate, size, words } from "./page.js";
import { Trouble, ask, options } from "./server.js";
import { Space } from "./view3d.js";

const path = (job, ...parts) => ["/v1/jobs", job.id, ...parts].map((part, number) => (number ? encodeURIComponent(part) : part)).join("/");

async function volume(job, name) {
  const answer = await ask(path(job, "volumes", name));
  const meta = JSON.parse(answer.headers.get("X-Volume"));
  const bytes = await answer.arrayBuffer();
  const data = new { int16: Int16Array, uint8: Uint8Array, float32: Float32Array }[meta.type](bytes);
  const [nx, ny, nz] = meta.size;
  if (data.length !== nx * ny * nz) throw new Trouble("The server sent a volume of another size than it said.");
  return { ...meta, data };
}

export async function showResult(mine, job) {
  const found = Object.fromEntries(await Promise.all(job.volumes.map(async (name) => [name, await volume(job, name)])));
  if (mine.left) return;
  const { ct, mask, before } = found;
  const root = $("#shown");
  root.replaceChildren(fromTemplate("done"));
  if (!ct) for (const part of all(".of-ct", root)) part.remove();
  if (!mask) for (const part of all(".of-mask", root)) part.remove();
  showViewer(mine, root, ct, mask, before);
  showFiles(root, job);
  showStructures(mine, root, job, ct, mask);
  root.dataset.job = job.id;
}

function showViewer(mine, root, ct, mask, before) {
  const grid = ct ?? mask;
  const labels = mask?.labels ?? {};
  const viewer = (mine.viewer = new Viewer($(".viewer", root), { ...grid, labels, centre: middle(grid, mask) }));
  if (!ct) {
    viewer.opacity = 1;
    $(".opacity", root).value = 1;
  }
  viewer.show(ct?.data, mask?.data);
  if (before && ct) {
    $(".before-after", root).hidden = false;
    for (const radio of all("[name=which]", root)) {
      radio.addEventListener("change", () => {
        const one = radio.value === "before" ? before : ct;
        viewer.show(one.data, mask?.data);
        mine.space?.load(one.data, mask?.data, viewer.hidden);
      });
    }
  }
  const canvas = $("canvas.volume", root);
  try {
    mine.space = new Space(canvas, { ...grid, labels });
  } catch (error) {
    console.info(`no 3D view: ${error.message}`);
    $(".no-space", root).hidden = false;
    $(".space-controls", root).remove();
    canvas.remove();
    return;
  }
  const { space } = mine;
  const [mode, turn, tilt] = ["mode", "turn", "tilt"].map((name) => $(`.${name}`, root));
  const set = () => {
    Object.assign(space, { mode: mode.value, turn: Number(turn.value), tilt: Number(tilt.value) });
    space.draw();
  };
  for (const control of [mode, turn, tilt]) control.addEventListener("input", set);
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    turn.value = ((Number(turn.value) + event.movementX / 2 + 540) % 360) - 180;
    tilt.value = Number(tilt.value) + event.movementY / 2;
    set();
  });
  Object.assign(space, { mode: mode.value, turn: Number(turn.value), tilt: Number(tilt.value) });
  space.load(ct?.data, mask?.data, viewer.hidden);
}

// The middle of what has a label beside the body's, where the eye wants to begin.
function middle({ size: [nx, ny, nz] }, mask) {
  if (!mask) return undefined;
  const low = [nx, ny, nz];
  const high = [-1, -1, -1];
  const painted = new Uint8Array(256);
  for (const [label, [colour]] of Object.entries(mask.labels)) painted[label] = colour ? 1 : 0;
  let at = 0;
  for (let z = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0; x < nx; x++, at++) {
        if (!painted[mask.data[at]]) continue;
        if (x < low[0]) low[0] = x;
        if (x > high[0]) high[0] = x;
        if (y < low[1]) low[1] = y;
        if (y > high[1]) high[1] = y;
        if (z < low[2]) low[2] = z;
        if (z > high[2]) high[2] = z;
      }
    }
  }
  return high[0] < 0 ? undefined : low.map((value, axis) => Math.floor((value + high[axis]) / 2));
}

// Each structure with its volume, counted here, and its median, as the server measured it.
function showStructures(mine, root, job, ct, mask) {
  const measured = new Map((job.metrics ?? []).map((metric) => [metric.name, metric]));
  const counts = new Uint32Array(256);
  for (const label of mask?.data ?? []) counts[label]++;
  const voxel = mask ? mask.spacing.reduce((a, b) => a * b) / 1000 : 0;
  const rows = Object.entries(mask?.labels ?? {}).map(([label, [colour, name]]) => {
    const metric = measured.get(name);
    measured.delete(name);
    return structure(mine, Number(label), colour, name, counts[label] * voxel, metric, ct);
  });
  for (const metric of measured.values()) rows.push(structure(mine, null, null, metric.name, null, metric, ct));
  $(".structures", root).replaceChildren(...rows);
}

function structure(mine, label, colour, name, ml, metric, ct) {
  const shown = element("label", {});
  if (colour) {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      const { viewer, space } = mine;
      if (box.checked) viewer.hidden.delete(label);
      else viewer.hidden.add(label);
      viewer.draw();
      space?.load(viewer.hu, viewer.mask, viewer.hidden);
    });
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `rgb(${colour.join(",")})`;
    shown.append(box, swatch);
  }
  shown.append(name);
  const row = element("tr", {}, element("th", { scope: "row" }, shown),
    element("td", { className: "number", textContent: ml == null ? "" : words(ml, ml < 10 ? 1 : 0) }));
  if (ct) {
    const known = metric?.low != null && metric?.high != null;
    const outside = known && metric.hu != null && !(metric.low <= metric.hu && metric.hu <= metric.high);
    row.append(
      element("td", { className: `number${outside ? " bad" : ""}`, textContent: metric?.hu == null ? "" : words(metric.hu) }),
      element("td", { textContent: known ? `${words(metric.low)} to ${words(metric.high)}${outside ? ": outside" : ""}` : "" }),
    );
  }
  return row;
}

function showFiles(root, job) {
  const link = (href, text, note) => element("li", {}, element("a", { href, download: "", textContent: text }), ` ${note}`);
  const ct = job.volumes.includes("ct");
  // A CT that was edited is DICOM only where it came as DICOM; the server says so.
  const dicom = ct && (job.dicom ?? (options.dicom !== false && job.request?.source?.kind !== "ct"));
  $(".files", root).replaceChildren(
    ...(job.files ?? []).map(({ name, bytes }) => link(path(job, "files", name), name, size(bytes))),
    ...(dicom ? [link(path(job, "dicom.zip"), "DICOM", "series with its Segmentation, as a zip")] : []),
    ...(ct ? [link(path(job, "picture.png"), "Picture", "the three planes as a PNG")] : []),
  );
  $(".notes", root).replaceChildren(...(job.notes ?? []).map((textContent) => element("li", { textContent })));
  $(".command", root).textContent = job.command ?? "";
  $(".copy", root).addEventListener("click", async (event) => {
    try {
      await navigator.clipboard.writeText(job.command);
      event.target.textContent = "Copied";
      announce("The command is copied.");
    } catch {
      getSelection().selectAllChildren($(".command", root));
      announce("Copying is not allowed here. The command is selected.");
    }
  });
}
