// What is said between the fragments of an MP4 that comes in pieces: which frame of a camera an image
// was made of (event messages, ISO/IEC 23009-1), each with the image's time in seconds.

const SCHEME = "urn:reward-forcing:camera";
const HEAD = 8; // bytes of a box before its body
const LARGEST = 1 << 16;

const join = (one, two) => {
  const both = new Uint8Array(one.length + two.length);
  both.set(one);
  both.set(two, one.length);
  return both;
};

export class MarkReader {
  rest = new Uint8Array();
  skipped = 0; // bytes of a box that are still to pass

  // offset: seconds that the player adds to the times of this video
  constructor(offset) {
    this.offset = offset;
  }

  // The marks in the next piece of the video.
  read(piece) {
    const marks = [];
    let bytes = this.rest.length ? join(this.rest, piece) : piece;
    for (;;) {
      const passed = Math.min(this.skipped, bytes.length);
      this.skipped -= passed;
      bytes = bytes.subarray(passed);
      if (this.skipped || bytes.length < HEAD) break;
      const view = new DataView(bytes.buffer, bytes.byteOffset);
      const [size, name] = [view.getUint32(0), String.fromCharCode(...bytes.subarray(4, HEAD))];
      const said = name === "emsg" && size <= LARGEST;
      if (said && bytes.length < size) break;
      if (said) marks.push(...this.marksOf(bytes.subarray(HEAD, size)));
      this.skipped = Math.max(size, HEAD);
    }
    this.rest = bytes.slice();
    return marks;
  }

  marksOf(body) {
    const view = new DataView(body.buffer, body.byteOffset, body.length);
    const time = Number(view.getBigUint64(8)) / view.getUint32(4);
    const [scheme, , data] = new TextDecoder().decode(body.subarray(24)).split("\0");
    return scheme === SCHEME ? [{ ...JSON.parse(data), time: time + this.offset }] : [];
  }
}
