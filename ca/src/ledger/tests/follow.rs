use tokio::task::JoinSet;

use super::*;

fn of_namespace(namespace: &str) -> IdentityFilter {
    IdentityFilter { namespace: Some(namespace.into()), ..IdentityFilter::default() }
}

/// The indexes of the next `count` identities, and what each answer held.
async fn follow(watch: &mut Watch, count: usize) -> Vec<u64> {
    let mut found = Vec::new();
    while found.len() < count {
        let identities = watch.next().await.unwrap();
        assert!(!identities.is_empty());
        found.extend(identities.into_iter().map(|identity| identity.index));
        assert!(found.last() < Some(&watch.next_entry()));
    }
    found
}

/// Every third entry is of another kind or namespace, and groups are of all sizes.
fn bodies(count: u64) -> Vec<Body> {
    let body = |number| match number % 3 {
        0 => issuance(number).into(),
        1 => Issuance { namespace: "other".into(), ..issuance(number) }.into(),
        _ => start("1"),
    };
    (0..count).map(body).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_begins_while_entries_arrive_tells_each_once_and_misses_none() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let mut writers = JoinSet::new();
    for writer in 0..4_u64 {
        let ledger = ledger.clone();
        writers.spawn(async move {
            for size in 0..40 {
                ledger.append_all(bodies(1 + (writer + size) % 7)).await.unwrap();
            }
        });
    }
    let mut watches = JoinSet::new();
    let mut begun = Vec::new();
    while !writers.is_empty() {
        let mut watch = ledger.watch(of_namespace("shop"), None).await.unwrap();
        begun.push(watch.next_entry());
        watches.spawn(async move {
            let from = watch.next_entry();
            let mut found = Vec::new();
            while let Ok(identities) = watch.next().await {
                found.extend(identities.into_iter().map(|identity| identity.index));
            }
            (from, found)
        });
        if begun.len() < 50 {
            tokio::task::yield_now().await;
            writers.try_join_next().transpose().unwrap();
        } else {
            writers.join_next().await.transpose().unwrap();
        }
    }
    let mut all: Vec<u64> = Vec::new();
    for index in 0..ledger.entries() {
        all.extend(ledger.show_entry(index).await.unwrap().filter(|found| found.issuance.namespace == "shop").map(|found| found.index));
    }
    // The last entry is for everybody, so that the ledger is closed only when all have seen it.
    let last = ledger.append(issuance(0).into()).await.unwrap();
    all.push(last);
    let mut seen = ledger.watch(of_namespace("shop"), Some(0)).await.unwrap();
    assert_eq!(follow(&mut seen, all.len()).await, all);
    ledger.queue.close().await;
    assert!(begun.iter().any(|from| *from > 0), "no watch began among arriving entries");
    for (from, found) in watches.join_all().await {
        let expected: Vec<_> = all.iter().copied().filter(|index| *index >= from).collect();
        assert_eq!(found, expected, "from {from}");
    }
}

#[tokio::test]
async fn a_watch_from_the_past_goes_through_what_was_recorded_and_then_waits() {
    let place = Place { segment_bytes: 16 << 20, ..Place::new() };
    let ledger = place.ledger().await;
    // Three blocks and a bit; the later ones an hour later.
    ledger.append_all(bodies(1500)).await.unwrap();
    place.clock.advance(Duration::from_secs(3600));
    ledger.append_all(bodies(1600)).await.unwrap();
    let expected = |from: u64| (from..3100).filter(|index| if *index < 1500 { index % 3 == 0 } else { (index - 1500) % 3 == 0 });

    let mut watch = ledger.watch(of_namespace("shop"), Some(3)).await.unwrap();
    let all: Vec<_> = expected(3).collect();
    assert_eq!(follow(&mut watch, all.len()).await, all);
    let since = IdentityFilter { since: Some(START + Duration::from_secs(60)), ..of_namespace("shop") };
    let mut watch = ledger.watch(since.clone(), None).await.unwrap();
    let recent: Vec<_> = expected(1500).collect();
    assert_eq!(follow(&mut watch, recent.len()).await, recent);
    assert_eq!(watch.next_entry(), 3100);

    let (found, next) = tokio::join!(watch.next(), ledger.append(issuance(1).into()));
    let found: Vec<_> = found.unwrap().iter().map(|identity| identity.index).collect();
    assert_eq!((found, next.unwrap()), (vec![3100], 3100));
    let mut resumed = ledger.watch(since, Some(watch.next_entry())).await.unwrap();
    ledger.append(issuance(2).into()).await.unwrap();
    assert_eq!(follow(&mut resumed, 1).await, [3101]);
}

#[tokio::test]
async fn a_watch_cannot_begin_after_the_end_and_ends_with_the_ledger() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append(issuance(1).into()).await.unwrap();
    let error = ledger.watch(IdentityFilter::default(), Some(2)).await.unwrap_err();
    assert!(matches!(error, LedgerError::NotThere { index: 2, entries: 1 }), "{error}");
    let mut watch = ledger.watch(IdentityFilter::default(), Some(1)).await.unwrap();
    ledger.close().await.unwrap();
    assert!(matches!(watch.next().await, Err(LedgerError::Closed)));
}
