"use strict";
// Three planes of each volume, drawn from the data that the page holds: int16 HU and uint8 labels, x fastest, RAS axes,
// gzipped and in base64. Radiological display: the patient's right is on the left, anterior and superior are up.

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

class Viewer {
  constructor(root) {
    this.root = root;
    Object.assign(this, JSON.parse(root.dataset.volume)); // size, spacing, labels
    this.window = [-160, 240];
    this.opacity = 0.4;
  }

  async open() {
    if (this.hu) return;
    this.hu = new Int16Array(await unpack(`${this.root.id}-ct`));
    if (this.labels) this.mask = new Uint8Array(await unpack(`${this.root.id}-mask`));
    const find = (selector) => this.root.querySelector(selector);
    const [low, high] = [find(".low"), find(".high")];
    const setWindow = () => {
      this.window = [Number(low.value), Number(high.value)];
      this.draw();
    };
    find(".preset").addEventListener("change", (event) => {
      [low.value, high.value] = event.target.value.split(",");
      setWindow();
    });
    low.addEventListener("input", setWindow);
    high.addEventListener("input", setWindow);
    find(".opacity")?.addEventListener("input", (event) => {
      this.opacity = Number(event.target.value);
      this.draw();
    });
    for (const name of Object.keys(PLANES)) this.connect(name);
    this.draw();
    this.root.dataset.ready = "true";
  }

  connect(name) {
    const plane = PLANES[name];
    const canvas = this.root.querySelector(`canvas.${name}`);
    const slider = this.root.querySelector(`input.${name}`);
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
    canvas.addEventListener("mousemove", (event) => this.read(name, canvas, Number(slider.value), event));
  }

  index([x, y, z]) {
    return x + this.size[0] * (y + this.size[1] * z);
  }

  read(name, canvas, slice, event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(canvas.width - 1, Math.floor(((event.clientX - box.left) / box.width) * canvas.width));
    const row = Math.min(canvas.height - 1, Math.floor(((event.clientY - box.top) / box.height) * canvas.height));
    const voxel = PLANES[name].voxel(this.size, Math.max(0, column), Math.max(0, row), slice);
    const at = this.index(voxel);
    const label = this.mask ? this.mask[at] : 0;
    const organ = label ? `, ${this.labels[label] ? this.labels[label][1] : `label ${label}`}` : "";
    this.root.querySelector(".read").textContent = `voxel ${voxel.join(", ")}: ${this.hu[at]} HU${organ}`;
  }

  draw() {
    for (const name of Object.keys(PLANES)) this.drawPlane(name);
  }

  drawPlane(name) {
    const plane = PLANES[name];
    const canvas = this.root.querySelector(`canvas.${name}`);
    const slice = Number(this.root.querySelector(`input.${name}`).value);
    this.root.querySelector(`output.${name}`).textContent = slice;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const [low, high] = this.window;
    const scale = 255 / Math.max(high - low, 1);
    let to = 0;
    for (let row = 0; row < canvas.height; row++) {
      for (let column = 0; column < canvas.width; column++) {
        const at = this.index(plane.voxel(this.size, column, row, slice));
        const grey = Math.min(255, Math.max(0, (this.hu[at] - low) * scale));
        const colour = this.mask && this.labels[this.mask[at]]?.[0];
        const share = colour ? this.opacity : 0;
        for (let channel = 0; channel < 3; channel++) {
          image.data[to++] = grey * (1 - share) + (colour ? colour[channel] * share : 0);
        }
        image.data[to++] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }
}

for (const details of document.querySelectorAll("details.case")) {
  const root = details.querySelector(".viewer");
  if (!root) continue;
  const viewer = new Viewer(root);
  const open = () => {
    if (details.open) {
      viewer.open().catch((error) => {
        root.querySelector(".read").textContent = `The volume cannot be shown: ${error}`;
        console.error(error);
      });
    }
  };
  details.addEventListener("toggle", open);
  open();
}
