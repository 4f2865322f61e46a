//! What is known, as Prometheus reads it (text format 0.0.4).

use serde_json::Value;

/// Name, help, and where the value is in a status; of the run.
const OF_RUN: [(&str, &str, &str); 11] = [
    ("ditharos_step", "Step that is being made.", "/step"),
    ("ditharos_steps", "Step at which the run ends.", "/steps"),
    ("ditharos_world_size", "Ranks.", "/world_size"),
    ("ditharos_starts", "Starts of the ranks by this launcher.", "/starts"),
    ("ditharos_logged_step", "Newest logged step, whose values follow.", "/log/step"),
    ("ditharos_loss", "Mean loss over the lanes.", "/log/loss"),
    ("ditharos_learning_rate", "Learning rate.", "/log/lr"),
    ("ditharos_gradient_norm", "Norm of the gradient.", "/log/grad_norm"),
    ("ditharos_images_per_second", "Samples per second, all ranks together.", "/log/images_per_s"),
    ("ditharos_checkpoint_step", "Step of the newest checkpoint.", "/checkpoint/step"),
    ("ditharos_checkpoint_timestamp_seconds", "When it was committed.", "/checkpoint/time"),
];

/// The same of each rank.
const OF_RANK: [(&str, &str, &str); 8] = [
    ("ditharos_rank_step", "Step that the rank is making.", "step"),
    ("ditharos_rank_images_per_second", "Samples per second of the rank.", "images_per_s"),
    ("ditharos_rank_data_wait_share", "Share of the time that it waits for data.", "data_wait_share"),
    ("ditharos_rank_own_seconds_per_step", "Its own work in a step.", "own_s_per_step"),
    ("ditharos_rank_wait_seconds_per_step", "Waiting for other ranks in a step.", "wait_s_per_step"),
    ("ditharos_rank_memory_bytes", "Resident memory.", "memory_bytes"),
    ("ditharos_rank_heard_seconds_ago", "Time since its last heartbeat.", "heard_s_ago"),
    ("ditharos_rank_straggler", "1: it is slower than the others.", "straggler"),
];

/// The text of a status.
pub fn text(status: &Value) -> String {
    let mut text = String::new();
    let mut put = |name: &str, help: &str, samples: Vec<(String, String)>| {
        if !samples.is_empty() {
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
            samples.iter().for_each(|(labels, value)| text.push_str(&format!("{name}{labels} {value}\n")));
        }
    };
    for (name, help, place) in OF_RUN {
        put(
            name,
            help,
            status.pointer(place).and_then(number).map(|value| (String::new(), value)).into_iter().collect(),
        );
    }
    let is_running = if status["state"] == "running" { "1" } else { "0" };
    put("ditharos_running", "1: ranks make steps.", vec![(String::new(), is_running.to_owned())]);
    let ranks = status["ranks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let labels = |rank: &Value, more: &str| {
        let host = escaped(rank["host"].as_str().unwrap_or_default());
        format!("{{rank=\"{}\",host=\"{host}\"{more}}}", rank["rank"])
    };
    for (name, help, key) in OF_RANK {
        put(name, help, ranks.iter().filter_map(|rank| Some((labels(rank, ""), number(&rank[key])?))).collect());
    }
    let phase = |rank: &Value| format!(",phase=\"{}\"", escaped(rank["phase"].as_str().unwrap_or_default()));
    let seconds = ranks.iter().filter_map(|rank| Some((labels(rank, &phase(rank)), number(&rank["phase_s"])?)));
    put("ditharos_rank_phase_seconds", "How long the rank is in the phase that it is in.", seconds.collect());
    text
}

fn number(value: &Value) -> Option<String> {
    match value {
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(is) => Some(u8::from(*is).to_string()),
        _ => None,
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_known_is_told_and_labels_cannot_break_out() {
        let status = json!({
            "state": "running", "step": 7, "steps": 9, "log": {"loss": null, "lr": 1e-4},
            "ranks": [{"rank": 0, "host": "a\"} 1\nx", "step": 7, "straggler": true, "phase": "data", "phase_s": 0.5, "images_per_s": null}],
        });
        let text = text(&status);
        let labels = r#"{rank="0",host="a\"} 1\nx""#;
        for line in [
            "# TYPE ditharos_step gauge",
            "ditharos_step 7",
            "ditharos_learning_rate 0.0001",
            "ditharos_running 1",
            &format!("ditharos_rank_straggler{labels}}} 1"),
            &format!("ditharos_rank_phase_seconds{labels},phase=\"data\"}} 0.5"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(!text.contains("ditharos_loss") && !text.contains("rank_images_per_second"), "{text}");
    }
}
