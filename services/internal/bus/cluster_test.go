package bus_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stopline-traffic/stopline/pkg/topic"
	"github.com/stopline-traffic/stopline/services/internal/bus"
	"github.com/stopline-traffic/stopline/services/internal/servicetest"
)

func TestCluster(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("electing leaders takes seconds")
	}
	b, err := bus.Connect(bus.ConnectOptions{URL: servicetest.Cluster(t), Name: "test", Logger: servicetest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	for range 2 { // declaring again changes nothing
		if err := b.DeclareWith(within(t), topic.Streams(district), bus.DeclareOptions{Replicas: 3}); err != nil {
			t.Fatal(err)
		}
	}
	st, err := b.JS.Stream(within(t), topic.AcceptedStream)
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().Config.Replicas; n != 3 {
		t.Errorf("got %d replicas, want 3", n)
	}
	for range 2 {
		publish(t, b, 10)
		if err := b.PublishAll(within(t), batch(100, "a")); err != nil {
			t.Fatal(err)
		}
	}
	c := make(chan string, 100)
	consuming(t, b, consumer(), func(_ context.Context, ms []*bus.Msg) error {
		for _, m := range ms {
			c <- string(m.Data)
		}
		return nil
	})
	for i, d := range got(t, c, 10) {
		if d != fmt.Sprint(i) {
			t.Errorf("got %s, want %d", d, i)
		}
	}
	checkPending(t, b, "c")
	if n := len(stored(t, b, topic.QuarantineStream)); n != 100 {
		t.Errorf("got %d messages, want 100", n)
	}
}
