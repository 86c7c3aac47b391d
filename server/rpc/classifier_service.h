// tern.v1.ImageClassifier over the callback API: reactions only validate and enqueue.
#ifndef TERN_SERVER_RPC_CLASSIFIER_SERVICE_H_
#define TERN_SERVER_RPC_CLASSIFIER_SERVICE_H_

#include "server/metrics/metrics.h"
#include "server/monitoring/label_join.h"
#include "server/rpc/open_streams.h"
#include "server/serving/classify.h"
#include "tern/v1/classifier.grpc.pb.h"

namespace tern::rpc {

// Thread safe. Everything must outlive the server that the service is registered with.
class ClassifierService final : public v1::ImageClassifier::CallbackService {
 public:
  ClassifierService(serving::Classifier* classifier, monitoring::LabelJoin* labels,
                    OpenStreams* streams, metrics::Metrics* metrics)
      : classifier_(classifier), labels_(labels), streams_(streams), metrics_(metrics) {}

  grpc::ServerUnaryReactor* Classify(grpc::CallbackServerContext* context,
                                     const v1::ClassifyRequest* request,
                                     v1::ClassifyResponse* response) override;
  grpc::ServerBidiReactor<v1::ClassifyRequest, v1::ClassifyStreamResponse>* ClassifyStream(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* ReportLabel(grpc::CallbackServerContext* context,
                                        const v1::ReportLabelRequest* request,
                                        v1::ReportLabelResponse* response) override;

 private:
  serving::Classifier* const classifier_;
  monitoring::LabelJoin* const labels_;
  OpenStreams* const streams_;
  metrics::Metrics* const metrics_;
};

}  // namespace tern::rpc

#endif  // TERN_SERVER_RPC_CLASSIFIER_SERVICE_H_
