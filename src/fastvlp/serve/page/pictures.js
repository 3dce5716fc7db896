// Pictures that were given to search by, under numbers. They are kept in this tab's storage, to be there after a reload.

export const dropped = new Map();

export async function keep(file) {
  const number = 1 + Math.max(0, ...dropped.keys());
  const picture = await smaller(file);
  dropped.set(number, picture);
  await store(number, picture);
  return number;
}

// A photograph has many times the pixels that a model reads, and is sent again for every page of results.
async function smaller(file) {
  if (file.size < 1e6) return file;
  const image = await createImageBitmap(file).catch(() => null);
  if (!image) return file;
  const scale = Math.min(1, 1024 / Math.max(image.width, image.height));
  const canvas = new OffscreenCanvas(Math.round(image.width * scale), Math.round(image.height * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

// A tab has room for a few megabytes: the oldest pictures make place for a new one.
async function store(number, picture) {
  const data = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => done(null);
    reader.readAsDataURL(picture);
  });
  for (let tries = 0; data && tries < 20; tries++) {
    try {
      return sessionStorage.setItem(`picture ${number}`, data);
    } catch {
      const [oldest] = keptNumbers();
      if (oldest === undefined) return;
      sessionStorage.removeItem(`picture ${oldest}`);
    }
  }
}

function keptNumbers() {
  try {
    const names = Object.keys(sessionStorage).filter((name) => /^picture \d+$/.test(name));
    return names.map((name) => Number(name.slice(8))).sort((a, b) => a - b);
  } catch {
    return []; // storage is switched off
  }
}

export function restorePictures() {
  for (const number of keptNumbers()) {
    const [head, data] = sessionStorage.getItem(`picture ${number}`).split(",");
    const bytes = Uint8Array.from(atob(data ?? ""), (letter) => letter.charCodeAt(0));
    dropped.set(number, new Blob([bytes], { type: head.slice(5).split(";")[0] }));
  }
}
