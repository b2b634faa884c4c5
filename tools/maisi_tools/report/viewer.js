"use strict";
// Three planes of a volume, int16 HU or uint8 labels or both, x fastest, RAS axes. Radiological display: the patient's
// right is on the left, anterior and superior are up. The report's page holds its volumes, gzipped and in base64; the
// studio's page fetches them.

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// Voxel (x, y, z) of a pixel, for each plane; n is the volume's size, k the slice.
const PLANES = {
  axial: { width: 0, height: 1, through: 2, voxel: (n, column, row, k) => [n[0] - 1 - column, n[1] - 1 - row, k] },
  coronal: { width: 0, height: 2, through: 1, voxel: (n, column, row, k) => [n[0] - 1 - column, k, n[2] - 1 - row] },
  sagittal: { width: 1, height: 2, through: 0, voxel: (n, column, row, k) => [k, n[1] - 1 - column, n[2] - 1 - row] },
};

// Keys on a plane: which of its axes the point moves along, and which way.
const STEPS = {
  ArrowLeft: ["width", 1],
  ArrowRight: ["width", -1],
  ArrowUp: ["height", 1],
  ArrowDown: ["height", -1],
  PageUp: ["through", 1],
  PageDown: ["through", -1],
};

class Viewer {
  constructor(root, { size, spacing, labels, centre, unit = "HU", window = [-160, 240] }) {
    Object.assign(this, { root, size, spacing, labels, unit, window });
    this.centre = centre ?? size.map((n) => Math.floor(n / 2));
    this.opacity = 0.4;
    this.hidden = new Set(); // labels that are not painted
  }

  // Shows HU, a mask or both; again for other volumes on the same grid.
  show(hu, mask) {
    const first = !this.root.dataset.ready;
    Object.assign(this, { hu, mask });
    if (first) this.connectAll();
    this.draw();
    this.root.dataset.ready = "true";
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  connectAll() {
    const [low, high] = [this.find(".low"), this.find(".high")]; // a mask alone has no window
    const setWindow = () => {
      this.window = [Number(low.value), Number(high.value)];
      this.draw();
    };
    this.find(".preset")?.addEventListener("change", (event) => {
      [low.value, high.value] = event.target.value.split(",");
      setWindow();
    });
    low?.addEventListener("input", setWindow);
    high?.addEventListener("input", setWindow);
    this.find(".opacity")?.addEventListener("input", (event) => {
      this.opacity = Number(event.target.value);
      this.draw();
    });
    for (const name of Object.keys(PLANES)) this.connect(name);
  }

  connect(name) {
    const plane = PLANES[name];
    const canvas = this.find(`canvas.${name}`);
    const slider = this.find(`input.${name}`);
    canvas.width = this.size[plane.width];
    canvas.height = this.size[plane.height];
    const mm = (axis) => this.size[axis] * this.spacing[axis];
    canvas.style.aspectRatio = `${mm(plane.width)} / ${mm(plane.height)}`;
    slider.max = this.size[plane.through] - 1;
    slider.value = this.centre[plane.through];
    slider.addEventListener("input", () => this.drawPlane(name));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      slider.value = Number(slider.value) - Math.sign(event.deltaY);
      this.drawPlane(name);
    }, { passive: false });
    canvas.addEventListener("mousemove", (event) => this.read(this.voxelAt(name, event)));
    canvas.addEventListener("click", (event) => this.goTo(this.voxelAt(name, event)));
    canvas.tabIndex = 0;
    canvas.addEventListener("keydown", (event) => {
      if (!STEPS[event.key]) return;
      event.preventDefault();
      const [edge, by] = STEPS[event.key];
      const voxel = this.point();
      voxel[plane[edge]] = Math.min(this.size[plane[edge]] - 1, Math.max(0, voxel[plane[edge]] + by));
      this.goTo(voxel);
    });
  }

  // The voxel where the three planes meet.
  point() {
    return ["sagittal", "coronal", "axial"].map((name) => Number(this.find(`input.${name}`).value));
  }

  index([x, y, z]) {
    return x + this.size[0] * (y + this.size[1] * z);
  }

  // The voxel under the pointer.
  voxelAt(name, event) {
    const canvas = this.find(`canvas.${name}`);
    const box = canvas.getBoundingClientRect();
    const column = Math.min(canvas.width - 1, Math.floor(((event.clientX - box.left) / box.width) * canvas.width));
    const row = Math.min(canvas.height - 1, Math.floor(((event.clientY - box.top) / box.height) * canvas.height));
    const slice = Number(this.find(`input.${name}`).value);
    return PLANES[name].voxel(this.size, Math.max(0, column), Math.max(0, row), slice);
  }

  // Turns all three planes to a voxel.
  goTo(voxel) {
    for (const [name, plane] of Object.entries(PLANES)) this.find(`input.${name}`).value = voxel[plane.through];
    this.draw();
    this.read(voxel);
  }

  read(voxel) {
    const at = this.index(voxel);
    const label = this.mask ? this.mask[at] : 0;
    const organ = label ? [this.labels[label] ? this.labels[label][1] : `label ${label}`] : [];
    const value = this.hu ? [`${Math.round(10 * this.hu[at]) / 10} ${this.unit}`.trim()] : [];
    this.find(".read").textContent = `voxel ${voxel.join(", ")}: ${[...value, ...organ].join(", ") || "nothing"}`;
  }

  draw() {
    for (const name of Object.keys(PLANES)) this.drawPlane(name);
  }

  drawPlane(name) {
    const plane = PLANES[name];
    const canvas = this.find(`canvas.${name}`);
    const slice = Number(this.find(`input.${name}`).value);
    this.find(`output.${name}`).textContent = slice;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const [low, high] = this.window;
    const scale = 255 / Math.max(high - low, 1);
    let to = 0;
    for (let row = 0; row < canvas.height; row++) {
      for (let column = 0; column < canvas.width; column++) {
        const at = this.index(plane.voxel(this.size, column, row, slice));
        const label = this.mask ? this.mask[at] : 0;
        // Without a CT the mask lies on a plain grey where the body is.
        const grey = this.hu ? Math.min(255, Math.max(0, (this.hu[at] - low) * scale)) : label ? 60 : 0;
        const colour = label && !this.hidden.has(label) && this.labels[label]?.[0];
        const share = colour ? this.opacity : 0;
        for (let channel = 0; channel < 3; channel++) {
          image.data[to++] = grey * (1 - share) + (colour ? colour[channel] * share : 0);
        }
        image.data[to++] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    this.cross();
  }

  // Says to the style sheet where the planes meet, as shares of each picture; the picture itself stays as it is.
  cross() {
    const point = this.point();
    for (const [name, plane] of Object.entries(PLANES)) {
      const style = this.find(`canvas.${name}`).parentElement.style;
      for (const edge of ["width", "height"]) {
        style.setProperty(`--${edge}`, 1 - (point[plane[edge]] + 0.5) / this.size[plane[edge]]);
      }
    }
  }
}

for (const details of document.querySelectorAll("details.case")) {
  const root = details.querySelector(".viewer");
  if (!root) continue;
  const viewer = new Viewer(root, JSON.parse(root.dataset.volume));
  let opened = false;
  const open = async () => {
    if (!details.open || opened) return;
    opened = true;
    try {
      const hu = new Int16Array(await unpack(`${root.id}-ct`));
      viewer.show(hu, viewer.labels && new Uint8Array(await unpack(`${root.id}-mask`)));
    } catch (error) {
      root.querySelector(".read").textContent = `The volume cannot be shown: ${error}`;
      console.error(error);
    }
  };
  details.addEventListener("toggle", open);
  open();
}
