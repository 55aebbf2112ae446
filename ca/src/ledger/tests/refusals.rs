use super::*;

fn refusal(number: u64, agent: &str) -> Refusal {
    Refusal {
        time: START + Duration::from_secs(number),
        agent: agent.into(),
        reason: if number.is_multiple_of(2) { "token_expired" } else { "csr_signature" }.into(),
        message: number.to_string(),
        namespace: "shop".into(),
        service_account: "cart".into(),
        pod: format!("cart-{}", number % 10),
        pod_uid: Some(uuid(number % 10)),
        request_id: String::new(),
    }
}

fn messages(refusals: &Refusals, filter: &RefusalFilter, limit: usize) -> Vec<u64> {
    refusals.list_newest(filter, limit).into_iter().map(|refusal| refusal.message.parse().unwrap()).collect()
}

#[test]
fn one_agent_fills_its_own_share_only() {
    let refusals = Refusals::new();
    refusals.add(refusal(0, "quiet"));
    for number in 1..500 {
        refusals.add(refusal(number, "loud"));
    }
    let all = messages(&refusals, &RefusalFilter::default(), usize::MAX);
    assert_eq!(all, (400..500).rev().chain([0]).collect::<Vec<_>>());
}

#[test]
fn the_last_ten_thousand_are_kept() {
    let refusals = Refusals::new();
    for number in 0..10_500 {
        refusals.add(refusal(number, &format!("agent-{}", number % 5000)));
    }
    assert_eq!(messages(&refusals, &RefusalFilter::default(), usize::MAX), (500..10_500).rev().collect::<Vec<_>>());
}

#[test]
fn refusals_are_found_by_agent_reason_and_pod() {
    let refusals = Refusals::new();
    for number in 0..40 {
        refusals.add(refusal(number, if number < 20 { "one" } else { "two" }));
    }
    let pod = |namespace: &str| PodFilter::Name { namespace: Some(namespace.into()), name: "cart-4".into() };
    let of = |filter: RefusalFilter| messages(&refusals, &filter, 3);
    assert_eq!(of(RefusalFilter { agent: Some("one".into()), ..RefusalFilter::default() }), [19, 18, 17]);
    assert_eq!(of(RefusalFilter { reason: Some("token_expired".into()), ..RefusalFilter::default() }), [38, 36, 34]);
    assert_eq!(of(RefusalFilter { pod: Some(pod("shop")), agent: Some("two".into()), reason: None }), [34, 24]);
    assert_eq!(of(RefusalFilter { pod: Some(pod("other")), ..RefusalFilter::default() }), [0; 0]);
    assert_eq!(of(RefusalFilter { pod: Some(PodFilter::Uid(uuid(7))), ..RefusalFilter::default() }), [37, 27, 17]);
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let refusals = Refusals::new();
    refusals.add(Refusal { message: "ä".repeat(1000), reason: "x".repeat(1000), ..refusal(0, "agent") });
    let kept = refusals.list_newest(&RefusalFilter::default(), 1).remove(0);
    assert_eq!((kept.message, kept.reason), ("ä".repeat(256), "x".repeat(512)));
}
