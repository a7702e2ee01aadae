/** Pictures: files to be sent, and their pixels at the model's size. */

export class Picture {
  /**
   * @param {Blob} blob The encoded image.
   * @param {string} name Its file name.
   * @param {{alt?: string, address?: string, made?: boolean, truth?: string}} more A description; where the server has it;
   *     whether it was made here, so that the visitor has no such file; what it shows, when that is known.
   */
  constructor(blob, name, { alt = name, address = "", made = false, truth = "" } = {}) {
    Object.assign(this, { blob, name, alt, address, made, truth });
  }

  /** Fetch one of the page's own images. */
  static async bundled(file, alt, truth) {
    const address = new URL(`page/images/${file}`, document.baseURI).href;
    const response = await fetch(address);
    if (!response.ok) throw new Error(`${file}: status ${response.status}`);
    return new Picture(await response.blob(), file, { alt, address, truth });
  }

  /** Return the pixels, scaled to `width` x `height` and laid over white as the service does; throws if it is no image. */
  async pixels(width, height) {
    const bitmap = await createImageBitmap(this.blob);
    const context = contextOf(new OffscreenCanvas(width, height));
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0, width, height);
    bitmap.close();
    return context.getImageData(0, 0, width, height);
  }

  /** Make a PNG of pixels. */
  static async drawn(pixels, name, alt, truth) {
    const canvas = new OffscreenCanvas(pixels.width, pixels.height);
    contextOf(canvas).putImageData(pixels, 0, 0);
    return new Picture(await canvas.convertToBlob({ type: "image/png" }), name, { alt, made: true, truth });
  }
}

/** Return uniform noise in [-1, 1], one value for each channel of each pixel. */
export function drawNoise(pixels) {
  return Float32Array.from({ length: pixels.data.length }, () => 2 * Math.random() - 1);
}

/** Return pixels moved by at most `epsilon` levels of 255. */
export function moved(pixels, noise, epsilon) {
  const data = pixels.data.map((value, i) => (i % 4 === 3 ? 255 : Math.round(value + epsilon * noise[i]))); // clamps
  return new ImageData(data, pixels.width, pixels.height);
}

/** Return the difference of two pictures around middle grey, `gain` times enlarged. */
export function difference(from, to, gain) {
  const data = to.data.map((value, i) => (i % 4 === 3 ? 255 : 128 + gain * (value - from.data[i]))); // clamps
  return new ImageData(data, to.width, to.height);
}

/** Show pixels on a canvas, one canvas pixel for each; the style sheet enlarges it. */
export function show(canvas, pixels, label) {
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  contextOf(canvas).putImageData(pixels, 0, 0);
  canvas.setAttribute("aria-label", label);
}

function contextOf(canvas) {
  return canvas.getContext("2d", { willReadFrequently: true });
}
