use super::*;

/// Starts `count` appends at once and waits for all of them.
async fn append_at_once(ledger: &Ledger, count: u64) -> Vec<Result<u64, LedgerError>> {
    let tasks: Vec<_> = (0..count)
        .map(|number| {
            let ledger = ledger.clone();
            tokio::spawn(async move { ledger.append(issuance(number).into()).await })
        })
        .collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}

#[tokio::test]
async fn sixty_four_concurrent_appends_share_a_few_syncs() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append(start("1")).await.unwrap();
    place.files.delay_syncs(Duration::from_millis(20));
    let before = place.files.syncs();
    let mut indexes: Vec<_> = append_at_once(&ledger, 64).await.into_iter().map(Result::unwrap).collect();
    let syncs = place.files.syncs() - before;
    assert!(syncs <= 6, "{syncs} syncs");
    indexes.sort_unstable();
    assert_eq!(indexes, (1..65).collect::<Vec<_>>());
    let stats = ledger.stats();
    assert_eq!((stats.entries, stats.queued_requests), (65, 0));
    assert!(stats.groups <= 7 && stats.commit_time > Duration::ZERO, "{stats:?}");
}

#[tokio::test]
async fn entries_of_one_request_follow_each_other_and_are_read_as_they_were_appended() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let bodies: Vec<Body> = vec![start("1"), issuance(5).into(), issuance(6).into(), start("2")];
    assert_eq!(ledger.append_all(bodies.clone()).await.unwrap(), [0, 1, 2, 3]);
    assert_eq!(ledger.append_all(Vec::new()).await.unwrap(), [0; 0]);
    for (index, body) in (0..).zip(bodies) {
        let entry = ledger.entry(index).await.unwrap().unwrap();
        assert_eq!((entry.body.clone(), entry.time()), (body, START));
        assert_eq!(entry.bytes(), &ledger.store().read(index..index + 1, 1).await.unwrap()[0]);
    }
    assert_eq!(ledger.entry(4).await.unwrap(), None);
    assert_eq!(ledger.entries(), 4);
}

#[tokio::test]
async fn an_entry_prepared_under_an_older_epoch_is_not_recorded() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let epoch = ledger.epoch();
    ledger.append_all_at(epoch, vec![issuance(1).into()]).await.unwrap();
    act(&ledger).await.unwrap();
    let refused = ledger.append_all_at(epoch, vec![issuance(2).into()]).await.unwrap_err();
    assert!(matches!(refused, LedgerError::EpochMoved { current } if current == epoch + 1 && current == ledger.epoch()), "{refused}");
    assert!(refused.is_retryable());
    assert_eq!(ledger.entries(), 2);
    ledger.append_all_at(ledger.epoch(), vec![issuance(2).into()]).await.unwrap();
}

/// The act waits while the first entry is synced, and the last one waits behind the act: it must not share a group with it.
#[tokio::test]
async fn an_entry_that_waits_behind_an_act_is_not_recorded() {
    let place = Place::new();
    let ledger = place.ledger().await;
    place.files.delay_syncs(Duration::from_millis(20));
    let epoch = ledger.epoch();
    let until_queued = async |requests: u64| {
        while ledger.stats().queued_requests != requests {
            tokio::task::yield_now().await;
        }
    };
    let acted = async {
        until_queued(0).await;
        act(&ledger).await
    };
    let after = async {
        until_queued(0).await;
        until_queued(1).await;
        ledger.append_all_at(epoch, vec![issuance(2).into()]).await
    };
    let (before, acted, after) = tokio::join!(ledger.append_all_at(epoch, vec![issuance(1).into()]), acted, after);
    assert_eq!((before.unwrap(), acted.unwrap()), (vec![0], 1));
    assert!(matches!(after, Err(LedgerError::EpochMoved { .. })));
}

#[tokio::test]
async fn two_replicas_of_one_store_record_one_after_the_other() {
    let place = Place::new();
    let store = place.store().await;
    let late = Arc::new(TestClock(Mutex::new(START - Duration::from_secs(60))));
    let east = Ledger::open(store.clone(), place.clock.clone(), place.options()).await.unwrap();
    let west = Ledger::open(store.clone(), late, place.options()).await.unwrap();
    for index in 0..10 {
        let ledger = if index % 2 == 0 { &east } else { &west };
        assert_eq!(ledger.append(issuance(index).into()).await.unwrap(), index);
        // The one whose clock is late takes the other's time.
        assert_eq!(ledger.entry(index).await.unwrap().unwrap().time(), START);
    }
    let epoch = west.epoch();
    act(&east).await.unwrap();
    assert!(matches!(west.append_all_at(epoch, vec![issuance(11).into()]).await, Err(LedgerError::EpochMoved { .. })));
    west.append_all_at(west.epoch(), vec![issuance(11).into()]).await.unwrap();
    assert_eq!(store.head().await.unwrap().entries, 12);
}

#[tokio::test]
async fn time_stands_still_while_the_clock_is_set_back() {
    let place = Place::new();
    let ledger = place.ledger().await;
    ledger.append(start("1")).await.unwrap();
    place.clock.set(START - Duration::from_secs(3600));
    ledger.append(start("2")).await.unwrap();
    ledger.close().await.unwrap();
    drop(ledger);
    let ledger = place.ledger().await;
    ledger.append(start("3")).await.unwrap();
    place.clock.set(START + Duration::from_secs(1));
    ledger.append(start("4")).await.unwrap();
    let mut times = Vec::new();
    for index in 0..4 {
        times.push(ledger.entry(index).await.unwrap().unwrap().time() - START);
    }
    assert_eq!(times, [0, 0, 0, 1].map(time::Duration::seconds));
}

#[tokio::test]
async fn a_full_queue_refuses_and_takes_more_once_it_has_room() {
    let place = Place::new();
    let options = LedgerOptions { queue_bytes: 8 << 10, ..place.options() };
    let ledger = Ledger::open(place.store().await, place.clock.clone(), options).await.unwrap();
    place.files.delay_syncs(Duration::from_millis(20));
    let results = append_at_once(&ledger, 64).await;
    let busy = results.iter().filter(|result| matches!(result, Err(LedgerError::Busy))).count();
    let recorded = results.iter().filter(|result| result.is_ok()).count();
    assert!(busy > 0 && recorded > 0 && busy + recorded == 64, "{busy} busy, {recorded} recorded");
    assert_eq!((ledger.entries(), ledger.stats().refused_busy), (recorded as u64, busy as u64));
    ledger.append(start("1")).await.unwrap();
}

#[tokio::test]
async fn what_no_group_can_hold_is_refused() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let long = start(&"x".repeat(MAX_ENTRY_BYTES));
    assert!(matches!(ledger.append(long).await, Err(LedgerError::TooLarge { what: "entry", .. })));
    let many = (0..100).map(|_| start(&"x".repeat(60_000))).collect();
    assert!(matches!(ledger.append_all(many).await, Err(LedgerError::TooLarge { what: "request", .. })));
    ledger.append(start(&"x".repeat(MAX_ENTRY_BYTES - 32))).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_stops_issuances_but_not_acts_until_there_is_room() {
    let place = Place { segment_bytes: 64 << 10, ..Place::new() };
    let ledger = place.ledger().await;
    ledger.append(start("1")).await.unwrap();
    place.files.set_capacity(Some(place.files.used()));
    let mut recorded = 0;
    let refused = loop {
        match ledger.append(issuance(recorded).into()).await {
            Ok(_) => recorded += 1,
            Err(error) => break error,
        }
        assert!(recorded < 10_000, "the disk does not fill up");
    };
    assert!(matches!(refused, LedgerError::Full(_)) && refused.is_retryable(), "{refused}");
    assert!(matches!(&*ledger.health().borrow(), LedgerHealth::Full(_)));
    let (issuance_result, act_result) = tokio::join!(ledger.append(issuance(recorded).into()), act(&ledger));
    assert!(matches!(issuance_result, Err(LedgerError::Full(_))));
    act_result.unwrap();
    place.files.set_capacity(None);
    ledger.append(issuance(recorded).into()).await.unwrap();
    assert!(matches!(&*ledger.health().borrow(), LedgerHealth::Ok));
}

#[tokio::test]
async fn after_a_failed_sync_nothing_more_is_recorded() {
    let place = Place::new();
    let ledger = place.ledger().await;
    let mut health = ledger.health();
    place.files.fail_every_sync();
    let failed = ledger.append(issuance(1).into()).await.unwrap_err();
    assert!(matches!(failed, LedgerError::Failed(_)) && !failed.is_retryable(), "{failed}");
    health.changed().await.unwrap();
    assert!(matches!(&*health.borrow(), LedgerHealth::Failed(_)));
    place.files.no_more_faults();
    assert!(matches!(ledger.append(issuance(1).into()).await, Err(LedgerError::Failed(_))));
    assert_eq!(ledger.entries(), 0);
}

#[tokio::test]
async fn closing_answers_what_was_accepted_and_accepts_no_more() {
    let place = Place::new();
    let ledger = place.ledger().await;
    place.files.delay_syncs(Duration::from_millis(20));
    let appends = append_at_once(&ledger, 16);
    let closing = async {
        let idle = ledger.stats();
        while ledger.stats() == idle {
            tokio::task::yield_now().await;
        }
        ledger.close().await.unwrap();
    };
    let (results, ()) = tokio::join!(appends, closing);
    let recorded = results.iter().filter(|result| result.is_ok()).count();
    assert!(results.iter().all(|result| matches!(result, Ok(_) | Err(LedgerError::Closed))), "{results:?}");
    assert!(matches!(ledger.append(start("1")).await, Err(LedgerError::Closed)));
    drop(ledger);
    assert_eq!(place.ledger().await.entries(), recorded as u64);
}
