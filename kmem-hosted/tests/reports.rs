//! Reports reach the sink from any context, whole or cut at a character's end.

use kmem::platform::{Level, Platform};
use kmem_hosted::{Hosted, REPORT_MAX, ReportLog, Shape};
use proptest::prelude::*;
use std::{sync::Arc, thread};

#[test]
fn a_sink_gets_reports_in_order() {
    let machine = Hosted::new(Shape::x86_64(1 << 20)).unwrap();
    let log = Arc::new(ReportLog::new());
    let sink = Arc::clone(&log);
    assert!(machine.set_report_sink(Arc::new(move |level, text: &str| sink.push(level, text))));
    assert!(!machine.set_report_sink(Arc::new(|_, _| ())), "one sink only");
    machine.report(Level::Bug, format_args!("frame {} freed twice", 7));
    let mark = log.count();
    machine.report(Level::Warning, format_args!("order:{}", 3));
    machine.report(Level::Info, format_args!("done"));
    assert_eq!(log.all()[0], (Level::Bug, "frame 7 freed twice".into()));
    assert_eq!(log.since(mark), [(Level::Warning, "order:3".into()), (Level::Info, "done".into())]);
}

#[test]
fn a_full_log_counts_what_it_loses() {
    let log = ReportLog::new();
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| (0..50).for_each(|i| log.push(Level::Info, &format!("report {i}"))));
        }
    });
    let kept = log.all();
    assert_eq!(kept.len() + log.lost(), 200);
    assert!(log.lost() > 0);
    assert!(kept.iter().all(|(_, text)| text.starts_with("report ")));
}

proptest! {
    #[test]
    fn long_reports_are_cut_between_characters(text in "[aä€𝄞]{0,1200}") {
        let machine = Hosted::new(Shape::x86_64(1 << 20)).unwrap();
        let log = Arc::new(ReportLog::new());
        let sink = Arc::clone(&log);
        machine.set_report_sink(Arc::new(move |level, text: &str| sink.push(level, text)));
        machine.report(Level::Info, format_args!("{text}"));
        let (_, kept) = log.all().remove(0);
        prop_assert!(text.starts_with(&kept));
        if text.len() <= REPORT_MAX {
            prop_assert_eq!(kept, text);
        } else {
            prop_assert!(kept.len() > REPORT_MAX - 4);
        }
    }
}

#[test]
fn a_sink_that_panics_harms_nobody() {
    let machine = Hosted::new(Shape::x86_64(1 << 20)).unwrap();
    machine.set_report_sink(Arc::new(|_, text: &str| panic!("no room for {text}")));
    machine
        .run(|_process| {
            machine.report(Level::Info, format_args!("a report"));
            assert!(machine.this_cpu().unwrap().context().may_sleep());
        })
        .unwrap();
}
