// Search in pages that were opened from the file system, where browsers refuse workers: a hidden frame takes the place
// of one. It has what the search of the theme uses of a worker: messages both ways, and importScripts.
if (location.protocol === "file:") {
  const load = (document, source) =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: source, onload: resolve, onerror: reject });
      document.body.append(script);
    });

  window.IFrameWorker = class extends EventTarget {
    constructor(source) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = async (...sources) => {
        for (const each of sources) await load(this.inside.document, each);
      };
      this.ready = load(this.inside.document, new URL(source, location.href).href);
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.inside.frameElement.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
