//! Whose line is it: splits an engine's output into lines of ranks.
//!
//! `mpirun --tag-output` marks every *piece* that it reads from a rank, not every line: a long line, or one written in
//! parts, comes as several marked pieces with pieces of other ranks between them. So each rank has its own unfinished
//! line here, and a mark anywhere switches between them.

use std::collections::BTreeMap;

use crate::cluster::Output;

/// A line of output without its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The rank that wrote it; `None`: the engine itself.
    pub rank: Option<usize>,
    /// The rank wrote it to its stderr.
    pub is_stderr: bool,
    /// The text; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// A longer line is cut, so that a rank that never ends its line cannot fill the memory.
const MAX_LINE_BYTES: usize = 1 << 20;

type Writer = (Option<usize>, bool);

/// Takes bytes of one stream as they come and gives whole lines.
pub struct Demux {
    output: Output,
    home: Writer,
    current: Writer,
    unfinished: BTreeMap<Writer, Vec<u8>>,
    /// Bytes that may be the beginning of a mark.
    pending: Vec<u8>,
}

impl Demux {
    /// For the engine's stdout or stderr.
    pub fn new(output: Output, is_stderr: bool) -> Demux {
        let home = match output {
            Output::RankZero => (Some(0), is_stderr),
            Output::Tagged | Output::Labelled => (None, is_stderr),
        };
        Demux { output, home, current: home, unfinished: BTreeMap::new(), pending: Vec::new() }
    }

    /// Takes the next bytes; gives the lines that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if self.output == Output::Labelled && self.is_at_start() {
                self.push_label(byte, &mut lines);
            } else if self.output == Output::Tagged && (byte == b'[' || !self.pending.is_empty()) {
                self.push_mark(byte, &mut lines);
            } else {
                self.push_text(byte, &mut lines);
            }
        }
        lines
    }

    /// Gives what is left when the stream has ended.
    pub fn finish(mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        self.release(&mut lines);
        lines.extend(
            self.unfinished
                .into_iter()
                .filter(|(_, bytes)| !bytes.is_empty())
                .map(|(writer, bytes)| line(writer, &bytes)),
        );
        lines
    }

    /// The line has not begun, or only with what may be a label.
    fn is_at_start(&self) -> bool {
        self.current == self.home && self.unfinished.get(&self.home).is_none_or(Vec::is_empty)
    }

    /// srun writes whole lines, each behind ` RANK: ` with blanks before shorter numbers.
    fn push_label(&mut self, byte: u8, lines: &mut Vec<Line>) {
        self.pending.push(byte);
        let text = String::from_utf8_lossy(&self.pending);
        if let Some(rank) = text.strip_suffix(": ") {
            // Where nothing but a number stands before it, it is one.
            if let Ok(rank) = rank.trim_start().parse() {
                self.current = (Some(rank), self.home.1);
                self.pending.clear();
                return;
            }
        }
        let number = text.trim_start_matches(' ');
        let digits = number.trim_start_matches(|c: char| c.is_ascii_digit());
        let could_be_label = digits.is_empty() || (digits == ":" && digits.len() < number.len());
        if !could_be_label || self.pending.len() > 16 {
            self.release(lines);
        }
    }

    fn push_mark(&mut self, byte: u8, lines: &mut Vec<Line>) {
        if byte == b'[' || !could_be_mark(&self.pending, byte) {
            self.release(lines);
            match byte {
                b'[' => self.pending.push(byte),
                _ => self.push_text(byte, lines),
            }
            return;
        }
        self.pending.push(byte);
        if let Some(writer) = mark(&self.pending) {
            self.current = writer;
            self.pending.clear();
        }
    }

    /// What looked like a mark was text.
    fn release(&mut self, lines: &mut Vec<Line>) {
        for byte in std::mem::take(&mut self.pending) {
            self.push_text(byte, lines);
        }
    }

    fn push_text(&mut self, byte: u8, lines: &mut Vec<Line>) {
        let unfinished = self.unfinished.entry(self.current).or_default();
        if byte != b'\n' {
            unfinished.push(byte);
        }
        if byte == b'\n' || unfinished.len() >= MAX_LINE_BYTES {
            lines.push(line(self.current, &std::mem::take(unfinished)));
        }
        if byte == b'\n' {
            self.current = self.home;
        }
    }
}

fn line((rank, is_stderr): Writer, bytes: &[u8]) -> Line {
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    Line { rank, is_stderr, text: String::from_utf8_lossy(bytes).into_owned() }
}

/// The rank and stream of a complete mark such as `[1,0]<stdout>:`.
fn mark(bytes: &[u8]) -> Option<Writer> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (ids, stream) = text.strip_prefix('[')?.strip_suffix(">:")?.split_once("]<")?;
    let (_job, rank) = ids.split_once(',')?;
    let is_stderr = match stream {
        "stdout" => false,
        "stderr" => true,
        _ => return None,
    };
    Some((Some(rank.parse().ok()?), is_stderr))
}

/// A mark is `[`, digits, `,`, digits, `]<std…>:`; anything else ends the guess at once.
fn could_be_mark(so_far: &[u8], next: u8) -> bool {
    const LONGEST: usize = 40;
    if so_far.len() >= LONGEST {
        return false;
    }
    let Some(close) = so_far.iter().position(|&byte| byte == b']') else {
        let has_comma = so_far.contains(&b',');
        return match next {
            b'0'..=b'9' => true,
            b',' => so_far.len() > 1 && !has_comma,
            b']' => has_comma && so_far.last() != Some(&b','),
            _ => false,
        };
    };
    let tail = &so_far[close + 1..];
    [b"<stdout>:", b"<stderr>:"].iter().any(|wanted| wanted.starts_with(tail) && wanted.get(tail.len()) == Some(&next))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(output: Output, pieces: &[&str]) -> Vec<(Option<usize>, bool, String)> {
        let mut demux = Demux::new(output, false);
        let mut lines: Vec<Line> = pieces.iter().flat_map(|piece| demux.push(piece.as_bytes())).collect();
        lines.extend(demux.finish());
        lines.into_iter().map(|line| (line.rank, line.is_stderr, line.text)).collect()
    }

    fn of(rank: Option<usize>, text: &str) -> (Option<usize>, bool, String) {
        (rank, false, text.to_owned())
    }

    #[test]
    fn marked_lines_belong_to_their_rank_and_others_to_the_engine() {
        let got = lines(Output::Tagged, &["[1,0]<stdout>:a\n[1,12]<stderr>:b\nmpirun says\n"]);
        assert_eq!(got, [of(Some(0), "a"), (Some(12), true, "b".into()), of(None, "mpirun says")]);
    }

    #[test]
    fn a_line_in_pieces_with_others_between_is_put_together() {
        let got = lines(Output::Tagged, &["[1,1]<stdout>:one [1,0]<stdout>:x\n", "[1,1]<stdout>:line\n"]);
        assert_eq!(got, [of(Some(0), "x"), of(Some(1), "one line")]);
    }

    #[test]
    fn a_mark_may_be_cut_anywhere() {
        let text = "[1,3]<stdout>:abc\n[1,2]<stdout>:d\n";
        for cut in 0..text.len() {
            let (head, tail) = text.split_at(cut);
            assert_eq!(lines(Output::Tagged, &[head, tail]), [of(Some(3), "abc"), of(Some(2), "d")], "cut at {cut}");
        }
    }

    #[test]
    fn brackets_in_text_stay_text() {
        let got = lines(Output::Tagged, &["[1,0]<stdout>:loss [0.1, 2][3,4] [1,2]<std> [[1,0\n"]);
        assert_eq!(got, [of(Some(0), "loss [0.1, 2][3,4] [1,2]<std> [[1,0")]);
    }

    #[test]
    fn labelled_lines_belong_to_their_rank_wherever_they_are_cut() {
        let text = "0: a: b\n 3: \n12: 7: c\nsrun: error: sn1: task 3: Killed\n12\nx";
        let wanted = [
            of(Some(0), "a: b"),
            of(Some(3), ""),
            of(Some(12), "7: c"),
            of(None, "srun: error: sn1: task 3: Killed"),
            of(None, "12"),
            of(None, "x"),
        ];
        for cut in 0..text.len() {
            let (head, tail) = text.split_at(cut);
            assert_eq!(lines(Output::Labelled, &[head, tail]), wanted, "cut at {cut}");
        }
    }

    #[test]
    fn a_single_rank_is_never_searched_for_marks() {
        assert_eq!(
            lines(Output::RankZero, &["[1,5]<stdout>:x\nlast"]),
            [of(Some(0), "[1,5]<stdout>:x"), of(Some(0), "last")]
        );
    }

    #[test]
    fn an_endless_line_is_cut() {
        let long = "x".repeat(MAX_LINE_BYTES + 5);
        let got = lines(Output::RankZero, &[&long]);
        assert_eq!(got.iter().map(|(_, _, text)| text.len()).collect::<Vec<_>>(), [MAX_LINE_BYTES, 5]);
    }

    #[test]
    fn carriage_returns_and_foreign_bytes_do_no_harm() {
        let mut demux = Demux::new(Output::RankZero, true);
        let got = demux.push(b"a\xffb\r\n");
        assert_eq!(got, [Line { rank: Some(0), is_stderr: true, text: "a\u{fffd}b".into() }]);
    }
}
