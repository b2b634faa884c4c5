// A volume in space, by casting a ray for each pixel: structures of the mask, a surface of the CT, or its brightest
// voxels. Drawn when something changes, never by a clock.

const HU = { low: -1000, high: 1500 }; // of the texture's 0 and 255
const SURFACES = { bone: 200, skin: -400 }; // HU
const LARGEST = 192; // voxels along an axis that are drawn; a larger volume is thinned

const VERTEX = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1, 0, 1); }`;

// Channels of "volume": HU, share of shown structures, share of anything that has a label.
const FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler3D;
uniform sampler3D volume, labels;
uniform sampler2D colours;
uniform vec3 right, up, into, half_size;
uniform float pixels, level, reach, voxel;
uniform int mode, steps;
out vec4 colour;

vec3 place(vec3 at) { return at / half_size * 0.5 + 0.5; }
float value(vec3 at, int channel) { return texture(volume, place(at))[channel]; }
vec3 normal(vec3 at, int channel, float d) {
  vec3 slope = vec3(
    value(at + vec3(d, 0, 0), channel) - value(at - vec3(d, 0, 0), channel),
    value(at + vec3(0, d, 0), channel) - value(at - vec3(0, d, 0), channel),
    value(at + vec3(0, 0, d), channel) - value(at - vec3(0, 0, d), channel));
  return -slope / max(length(slope), 1e-5);
}

void main() {
  vec2 on_screen = (gl_FragCoord.xy / pixels * 2.0 - 1.0) * reach;
  vec3 start = right * on_screen.x + up * on_screen.y - into * 2.0;
  vec3 slow = into + vec3(lessThan(abs(into), vec3(1e-5))) * 1e-5;
  vec3 a = (-half_size - start) / slow, b = (half_size - start) / slow;
  vec3 first = min(a, b), last = max(a, b);
  float near = max(max(first.x, first.y), first.z), far = min(min(last.x, last.y), last.z);
  colour = vec4(0, 0, 0, 1);
  if (near >= far) return;
  float step_length = 2.2 / float(steps), brightest = 0.0, veil = -1.0;
  int channel = mode == 2 ? 1 : 0;
  for (float t = near; t < far; t += step_length) {
    vec3 at = start + into * t;
    vec3 here = texture(volume, place(at)).rgb;
    if (mode == 0) { brightest = max(brightest, here.r); continue; }
    if (mode == 2 && veil < 0.0 && here.b >= 0.5) veil = 1.0 - abs(dot(normal(at, 2, 1.5 * voxel), into));
    if (here[channel] < level) continue;
    float from = t - step_length, to = t;
    for (int i = 0; i < 6; i++) {
      float middle = 0.5 * (from + to);
      if (value(start + into * middle, channel) < level) from = middle; else to = middle;
    }
    at = start + into * to;
    vec3 paint = vec3(0.93, 0.88, 0.8);
    if (mode == 2) {
      // The label may lie a little behind the smooth surface.
      paint = vec3(0.6);
      for (int i = 0; i < 8; i++) {
        vec4 found = texture(colours, vec2((texture(labels, place(at + into * 0.3 * voxel * float(i))).r * 255.0 + 0.5) / 256.0, 0.5));
        if (found.a > 0.5) { paint = found.rgb; break; }
      }
    }
    vec3 n = normal(at, channel, 1.5 * voxel);
    float light = max(dot(n, normalize(-into + 0.4 * up - 0.3 * right)), 0.0);
    colour = vec4(paint * (0.3 + 0.75 * light), 1);
    break;
  }
  if (mode == 0) colour = vec4(vec3(brightest), 1);
  if (veil >= 0.0) colour.rgb = mix(colour.rgb, vec3(0.75, 0.82, 0.9), 0.06 + 0.5 * veil * veil * veil);
}`;

function build(gl) {
  const program = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || "no program");
  return program;
}

export class Space {
  // Throws where the browser has no WebGL2.
  constructor(canvas, { size, spacing, labels }) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true });
    if (!this.gl) throw new Error("no WebGL2");
    this.program = build(this.gl);
    this.labels = labels;
    this.mode = "organs";
    this.turn = this.tilt = 0; // degrees
    this.step = size.map((n) => Math.ceil(n / LARGEST));
    this.full = size;
    this.size = size.map((n, axis) => Math.floor((n - 1) / this.step[axis]) + 1);
    const mm = size.map((n, axis) => n * spacing[axis]);
    // The box touches the unit sphere from inside. Its corners may leave the picture: they hold air.
    this.half = mm.map((length) => length / Math.hypot(...mm));
    this.reach = 1.1 * Math.max(...this.half);
    this.voxel = Math.max(...this.half.map((half, axis) => (2 * half) / this.size[axis]));
    this.textures = {};
  }

  texture(name, unit, target, filter) {
    const { gl } = this;
    this.textures[name] ??= gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(target, this.textures[name]);
    for (const key of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(target, key, filter);
    for (const key of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T, gl.TEXTURE_WRAP_R]) gl.texParameteri(target, key, gl.CLAMP_TO_EDGE);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  }

  // Volumes on the grid; hidden labels are left out.
  load(hu, mask, hidden) {
    const { gl } = this;
    const [nx, ny, nz] = this.size;
    const values = new Uint8Array(3 * nx * ny * nz);
    const ids = new Uint8Array(nx * ny * nz);
    const painted = new Uint8Array(256);
    for (const [label, [colour]] of Object.entries(this.labels ?? {})) {
      if (colour && !hidden.has(Number(label))) painted[label] = 255;
    }
    let to = 0;
    for (let z = 0; z < nz; z++) {
      for (let y = 0; y < ny; y++) {
        let at = this.full[0] * (y * this.step[1] + this.full[1] * z * this.step[2]);
        for (let x = 0; x < nx; x++, at += this.step[0], to++) {
          const label = mask ? mask[at] : 0;
          ids[to] = label;
          if (hu) values[3 * to] = Math.min(255, Math.max(0, ((hu[at] - HU.low) / (HU.high - HU.low)) * 255));
          values[3 * to + 1] = painted[label];
          values[3 * to + 2] = label ? 255 : 0;
        }
      }
    }
    this.texture("volume", 0, gl.TEXTURE_3D, gl.LINEAR);
    gl.texImage3D(gl.TEXTURE_3D, 0, gl.RGB8, nx, ny, nz, 0, gl.RGB, gl.UNSIGNED_BYTE, values);
    this.texture("labels", 1, gl.TEXTURE_3D, gl.NEAREST);
    gl.texImage3D(gl.TEXTURE_3D, 0, gl.R8, nx, ny, nz, 0, gl.RED, gl.UNSIGNED_BYTE, ids);
    const colours = new Uint8Array(4 * 256);
    for (const [label, [colour]] of Object.entries(this.labels ?? {})) {
      if (painted[label]) colours.set([...colour, 255], 4 * label);
    }
    this.texture("colours", 2, gl.TEXTURE_2D, gl.NEAREST);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, colours);
    this.draw();
  }

  // At half the resolution first, in full when nothing has changed for a moment: a laptop's processor may do all of it.
  draw() {
    clearTimeout(this.later);
    this.wanted ??= requestAnimationFrame(() => {
      this.wanted = undefined;
      this.render(240);
    });
    this.later = setTimeout(() => this.render(480), 250);
  }

  render(pixels) {
    const { gl, program } = this;
    if (gl.isContextLost()) return;
    if (this.canvas.width !== pixels) this.canvas.width = this.canvas.height = pixels;
    gl.viewport(0, 0, pixels, pixels);
    const [a, b] = [(this.turn * Math.PI) / 180, (this.tilt * Math.PI) / 180];
    // From the front, the patient's right on the left: right is -x, into the screen is -y, up is z.
    const right = [-Math.cos(a), Math.sin(a), 0];
    const front = [-Math.sin(a), -Math.cos(a), 0];
    const into = [front[0] * Math.cos(b), front[1] * Math.cos(b), -Math.sin(b)];
    const up = [front[0] * Math.sin(b), front[1] * Math.sin(b), Math.cos(b)];
    const at = (name) => gl.getUniformLocation(program, name);
    gl.useProgram(program);
    gl.uniform1i(at("volume"), 0);
    gl.uniform1i(at("labels"), 1);
    gl.uniform1i(at("colours"), 2);
    gl.uniform3fv(at("right"), right);
    gl.uniform3fv(at("up"), up);
    gl.uniform3fv(at("into"), into);
    gl.uniform3fv(at("half_size"), this.half);
    gl.uniform1f(at("pixels"), pixels);
    gl.uniform1f(at("reach"), this.reach);
    gl.uniform1f(at("voxel"), this.voxel);
    gl.uniform1i(at("steps"), pixels < 480 ? 128 : 256);
    gl.uniform1i(at("mode"), { brightest: 0, organs: 2 }[this.mode] ?? 1);
    gl.uniform1f(at("level"), this.mode in SURFACES ? (SURFACES[this.mode] - HU.low) / (HU.high - HU.low) : 0.5);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    this.canvas.dataset.drawn = `${this.mode} ${pixels}`;
  }

  // Browsers keep few contexts: one that is done is handed back.
  close() {
    clearTimeout(this.later);
    cancelAnimationFrame(this.wanted);
    this.gl.getExtension("WEBGL_lose_context")?.loseContext();
  }
}
