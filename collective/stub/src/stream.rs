//! Streams and events: work in the order in which it was put there, at some later time.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

type Work = Box<dyn FnOnce() + Send>;

/// A queue with a thread.
pub struct Stream {
    pub name: String,
    queue: Mutex<Sender<Work>>,
}

impl Stream {
    pub fn new(name: String) -> Arc<Stream> {
        let (queue, work) = channel::<Work>();
        std::thread::spawn(move || work.into_iter().for_each(|work| work()));
        Arc::new(Stream { name, queue: Mutex::new(queue) })
    }

    /// The one that null stands for.
    pub fn default_stream() -> Arc<Stream> {
        static STREAM: OnceLock<Arc<Stream>> = OnceLock::new();
        STREAM.get_or_init(|| Stream::new("default".to_owned())).clone()
    }

    pub fn push(&self, work: impl FnOnce() + Send + 'static) {
        self.queue.lock().expect("stub").send(Box::new(work)).expect("stub stream");
    }

    pub fn synchronize(&self) {
        let (done, wait) = channel();
        self.push(move || done.send(()).expect("stub stream"));
        wait.recv().expect("stub stream");
    }
}

/// A point in a stream.
pub struct Event {
    pub name: String,
    /// Times recorded, times reached.
    state: Mutex<(u64, u64)>,
    changed: Condvar,
}

impl Event {
    pub fn new(name: String) -> Arc<Event> {
        Arc::new(Event { name, state: Mutex::new((0, 0)), changed: Condvar::new() })
    }

    pub fn record(self: &Arc<Event>, stream: &Stream) {
        let mut state = self.state.lock().expect("stub");
        state.0 += 1;
        let (version, event) = (state.0, self.clone());
        stream.push(move || {
            event.state.lock().expect("stub").1 = version;
            event.changed.notify_all();
        });
    }

    pub fn is_reached(&self) -> bool {
        let state = self.state.lock().expect("stub");
        state.1 >= state.0
    }

    /// Lets later work of `stream` wait for what is recorded now.
    pub fn delay(self: &Arc<Event>, stream: &Stream) {
        let (version, event) = (self.state.lock().expect("stub").0, self.clone());
        stream.push(move || {
            let mut state = event.state.lock().expect("stub");
            while state.1 < version {
                state = event.changed.wait(state).expect("stub");
            }
        });
    }
}
